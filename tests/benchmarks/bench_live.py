"""Live test of the policies: a real server for each under the same arrivals over a real socket, open loop, in turns.

    python -m tests.benchmarks.bench_live --images cifar10/test --budget-ms 100 --plot live.png --json live.json

The load is a multiple of what the server carries with its largest sub-network alone, measured first in a closed loop.
Attainment and latency are measured by the client; a request counts as in time if its answer arrives within its budget.
Folders of class folders give true accuracy as well; a flat folder of photographs gives only the expected accuracy.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

START_LIMIT_S = 300
PROFILE_LIMIT_S = 300  # for the server to measure latencies in idle moments, of which the first server has enough
SETTLE_S = 1.0
SUFFIXES = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True, slots=True)
class Picture:
    data: bytes
    label: str | None


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    latency_s: float
    expected: float | None
    correct: bool | None
    subnetwork: str


@dataclass(frozen=True, slots=True)
class Row:
    """One policy under one scenario; shares and accuracies in percent."""

    policy: str
    scenario: str
    requests: int
    offered_per_s: float
    attainment: float
    effective: float
    effective_true: float | None
    answered_per_s: float
    p50_ms: float
    p99_ms: float
    refused: int
    refusal_p50_ms: float
    switches_per_s: float
    rss_mb: float
    statuses: dict[int, int]


def read_pictures(folder: Path, count: int) -> list[Picture]:
    """Read up to `count` random images below `folder`; a class folder's name is the label."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    files = random.Random(0).sample(files, min(count, len(files)))
    return [Picture(path.read_bytes(), path.parent.name if path.parent != folder else None) for path in files]


@asynccontextmanager
async def server(policy: str, arguments: Sequence[str]) -> AsyncIterator[tuple[str, int]]:
    """Run `supervit serve` with a policy, whose name may end in "+cascades"; yield its URL and process id."""
    policy, _, extra = policy.partition("+")
    arguments = [f"--{extra}", *arguments] if extra else arguments
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port), "--policy", policy, *arguments]
    process = await asyncio.to_thread(subprocess.Popen, [*command, "--log-level", "warning"])
    url = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession() as session:
            deadline = time.monotonic() + START_LIMIT_S
            while not await is_ready(session, url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server with {policy} did not become ready")
                await asyncio.sleep(0.1)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


async def is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(f"{url}/health/ready") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


async def finish_profile(url: str) -> None:
    """Let a server finish its profile now, so that it does not measure during another server's turn."""
    deadline = time.monotonic() + PROFILE_LIMIT_S
    async with aiohttp.ClientSession() as session:
        measured = 0.0
        while measured < 1 and time.monotonic() < deadline:
            async with session.get(f"{url}/health/ready") as response:
                measured = (await response.json())["profile_measured"]
            await asyncio.sleep(SETTLE_S)


async def ask(session: aiohttp.ClientSession, url: str, picture: Picture, query: str) -> Reply:
    started = time.perf_counter()
    try:
        async with session.post(f"{url}/classify?top_k=1{query}", data=picture.data) as response:
            body = await response.read()
            latency_s, status = time.perf_counter() - started, response.status
    except (aiohttp.ClientError, TimeoutError):
        return Reply(0, time.perf_counter() - started, None, None, "")
    if status != 200:
        return Reply(status, latency_s, None, None, "")
    answer: dict[str, Any] = json.loads(body)
    chosen = answer["subnetwork"]
    name = f"{chosen['patch_grid']}-{chosen['keep_rate']:g}"
    correct = None if picture.label is None else answer["predictions"][0]["label"] == picture.label
    return Reply(status, latency_s, chosen["expected_accuracy"], correct, name)


def connect(limit: int = 0) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=limit, keepalive_timeout=60)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60))


async def closed_loop(url: str, pictures: Sequence[Picture], concurrency: int, seconds: float) -> float:
    """Return how many requests per second are answered in a closed loop of `concurrency` clients."""
    answered = 0
    async with connect() as session:
        end = time.perf_counter() + seconds

        async def client(number: int) -> None:
            nonlocal answered
            while time.perf_counter() < end:
                reply = await ask(session, url, pictures[(answered * 7 + number) % len(pictures)], "&budget_ms=60000")
                answered += reply.status == 200

        started = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(concurrency)))
        return answered / (time.perf_counter() - started)


async def open_loop(
    url: str, pictures: Sequence[Picture], arrivals: Sequence[float], budget_ms: float
) -> list[tuple[float, Reply]]:
    """Send a request at each instant, however many are still waiting; return (arrival, reply) in order of arrival."""
    async with connect() as session:
        started = time.perf_counter()
        tasks = []
        for number, at in enumerate(arrivals):
            if (wait := started + at - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            query = f"&budget_ms={budget_ms:g}"
            tasks.append(asyncio.create_task(ask(session, url, pictures[number % len(pictures)], query)))
        replies = await asyncio.gather(*tasks)
    return list(zip(arrivals, replies, strict=True))


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    rng, at, arrivals = random.Random(seed), 0.0, []
    while (at := at + rng.expovariate(rate)) < seconds:
        arrivals.append(at)
    return arrivals


def bursts(rate: float, seconds: float, seed: int) -> list[float]:
    """Draw arrivals at twice the rate in every other second, and none in between."""
    return [at for at in poisson(2 * rate, seconds, seed) if int(at) % 2 == 0]


def summarise(
    policy: str, scenario: str, sent: Sequence[tuple[float, Reply]], budget_ms: float, seconds: float, rss_mb: float
) -> Row:
    replies = [reply for _, reply in sent]
    in_time = [reply for reply in replies if reply.status == 200 and reply.latency_s <= budget_ms / 1000]
    answered = sorted(reply.latency_s for reply in replies if reply.status == 200)
    refused = [reply.latency_s for reply in replies if reply.status == 429]
    names = [reply.subnetwork for reply in replies if reply.status == 200]
    share = 100 / max(1, len(replies))
    labelled = any(reply.correct is not None for reply in replies)
    return Row(
        policy=policy,
        scenario=scenario,
        requests=len(replies),
        offered_per_s=len(replies) / seconds,
        attainment=share * len(in_time),
        effective=share * sum(reply.expected or 0.0 for reply in in_time),
        effective_true=share * sum(bool(reply.correct) for reply in in_time) if labelled else None,
        answered_per_s=len(in_time) / seconds,
        p50_ms=1000 * statistics.median(answered) if answered else float("nan"),
        p99_ms=1000 * answered[int(0.99 * len(answered))] if answered else float("nan"),
        refused=len(refused),
        refusal_p50_ms=1000 * statistics.median(refused) if refused else float("nan"),
        switches_per_s=sum(a != b for a, b in pairwise(names)) / seconds,
        rss_mb=rss_mb,
        statuses=dict(Counter(reply.status for reply in replies)),
    )


def resident_mb(pid: int) -> float:
    fields = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1]
    return int(fields.split()[0]) / 1024


async def run(options: argparse.Namespace, pictures: Sequence[Picture], capacity: float) -> list[Row]:
    """Run every scenario in turns of the policies: the speed of a shared machine drifts, which must favour none."""
    rows = []
    async with AsyncExitStack() as stack:
        servers = {
            policy: await stack.enter_async_context(server(policy, options.serve)) for policy in options.policies
        }
        for url, _ in servers.values():
            await finish_profile(url)
        for url, _ in servers.values():
            await closed_loop(url, pictures, 4, SETTLE_S)
        for scenario, rate, noisy in scenarios(options, capacity):
            make = bursts if scenario.startswith("bursts") else poisson
            sent: dict[str, list[tuple[float, Reply]]] = {policy: [] for policy in servers}
            for turn in range(options.turns):
                arrivals = make(rate, options.seconds, options.seed + turn)
                for policy, (url, _) in servers.items():
                    neighbour = asyncio.create_task(burn(options.seconds)) if noisy else None
                    sent[policy] += await open_loop(url, pictures, arrivals, options.budget_ms)
                    if neighbour:
                        await neighbour
                    await asyncio.sleep(SETTLE_S)
            seconds = options.turns * options.seconds
            for policy, (_, pid) in servers.items():
                row = summarise(policy, scenario, sent[policy], options.budget_ms, seconds, resident_mb(pid))
                rows.append(row)
                print(line(row), flush=True)
    return rows


def scenarios(options: argparse.Namespace, capacity: float) -> list[tuple[str, float, bool]]:
    steady = [(f"{load:g}x", load * capacity, False) for load in options.loads]
    if options.only_steady:
        return steady
    return [("bursts 1x", capacity, False), ("neighbour 0.5x", 0.5 * capacity, True), *steady]


async def burn(seconds: float) -> None:
    """Run a process that burns a core for the middle half of the scenario."""
    await asyncio.sleep(seconds / 4)
    process = await asyncio.to_thread(subprocess.Popen, [sys.executable, "-c", "while True: pass"])
    await asyncio.sleep(seconds / 2)
    process.kill()
    process.wait()


def line(row: Row) -> str:
    true = "     -" if row.effective_true is None else f"{row.effective_true:6.2f}"
    return (
        f"{row.policy:16s} {row.scenario:15s} {row.offered_per_s:7.1f}/s  in time {row.attainment:6.2f} %  "
        f"effective {row.effective:6.2f} %  true {true} %  p50 {row.p50_ms:7.1f} ms  p99 {row.p99_ms:7.1f} ms  "
        f"refused {row.refused:5d} ({row.refusal_p50_ms:.1f} ms)  switches {row.switches_per_s:5.1f}/s  "
        f"{row.rss_mb:.0f} MB  {row.statuses}"
    )


async def measure_capacity(options: argparse.Namespace, pictures: Sequence[Picture]) -> float:
    async with server(options.largest, options.serve) as (url, _):
        await closed_loop(url, pictures, 16, SETTLE_S)
        return await closed_loop(url, pictures, 16, options.seconds / 2)


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    names = list(dict.fromkeys(row.scenario for row in rows))
    for policy in dict.fromkeys(row.policy for row in rows):
        of_policy = {row.scenario: row for row in rows if row.policy == policy}
        width = 3 if policy == "level" else 1.2
        axes[0].plot(names, [of_policy[name].effective for name in names], "o-", label=policy, linewidth=width)
        axes[1].plot(names, [of_policy[name].attainment for name in names], "o-", label=policy, linewidth=width)
    axes[0].set(ylabel="effective accuracy (%)", title=title)
    axes[1].set(ylabel="answered in time (%)")
    for each in axes:
        each.grid(alpha=0.3)
        each.tick_params(axis="x", rotation=45)
    axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=120)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of class folders, or of photographs")
    parser.add_argument("--budget-ms", type=float, default=100)
    parser.add_argument("--seconds", type=float, default=10, help="length of each turn")
    parser.add_argument("--turns", type=int, default=3, help="of each policy in each scenario")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.7, 1, 1.5, 2, 3])
    parser.add_argument("--largest", default="fixed-8-1", help="the policy that always takes the largest sub-network")
    parser.add_argument("--policies", nargs="+", default=["level", "fixed-8-1", "fixed-5-0.5", "slackfit"])
    parser.add_argument("--capacity", type=float, help="requests per second that stand for 1x; measured by default")
    parser.add_argument("--only-steady", action="store_true", help="neither bursts nor a neighbour")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further options of supervit serve")
    options = parser.parse_args()
    pictures = read_pictures(options.images, 2000)
    capacity = options.capacity or await measure_capacity(options, pictures)
    print(f"{os.cpu_count()} CPUs; 1x is {capacity:.1f} requests/s, what {options.largest} carries in a closed loop")
    rows = await run(options, pictures, capacity)
    if options.json:
        options.json.write_text(json.dumps({"capacity": capacity, "rows": [asdict(row) for row in rows]}, indent=1))
    if options.plot:
        plot(rows, options.plot, f"{options.images.parent.name}, {options.budget_ms:g} ms, 1x = {capacity:.0f}/s")


if __name__ == "__main__":
    uvloop.run(main())
