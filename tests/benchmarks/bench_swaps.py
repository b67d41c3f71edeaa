"""What clients see while the model changes under load: `python -m tests.benchmarks.bench_swaps --images cifar10/test`.

Two checkpoints of the same weights under different names replace each other repeatedly, by PUT /admin/model, under
Poisson arrivals at a multiple of what the largest sub-network carries in a closed loop. Before the first change, and
between changes, the same load runs for a while without a change. A change is compared with the load between changes,
because the speed of a shared machine drifts. A request is lost if its answer is not 200, 429 or 504.
"""

import argparse
import asyncio
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import uvloop

from models.checkpoint import load_checkpoint, save_checkpoint
from models.header import Header
from tests.benchmarks.bench_live import (
    SETTLE_S,
    Picture,
    Reply,
    ask,
    closed_loop,
    connect,
    measure_capacity,
    read_pictures,
    resident_mb,
    server,
)

CHANGE_LIMIT_S = 300.0
BETWEEN = "between changes"


class Load:
    """Sends requests as a Poisson process until it is stopped, however many are still waiting."""

    def __init__(self, url: str, pictures: Sequence[Picture], rate: float, budget_ms: float) -> None:
        self._url, self._pictures, self._rate, self._budget_ms = url, pictures, rate, budget_ms
        self._is_over = False
        self.step = ""  # of the change in progress
        self.replies: list[tuple[str, Reply]] = []

    async def run(self) -> None:
        rng, at, started = random.Random(0), 0.0, time.perf_counter()
        tasks: list[asyncio.Task[tuple[str, Reply]]] = []
        async with connect() as session:
            while not self._is_over:
                at += rng.expovariate(self._rate)
                if (wait := started + at - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                picture = self._pictures[len(tasks) % len(self._pictures)]
                tasks.append(asyncio.create_task(self._ask(session, picture)))
            self.replies = await asyncio.gather(*tasks)

    async def _ask(self, session: aiohttp.ClientSession, picture: Picture) -> tuple[str, Reply]:
        step = self.step
        return step, await ask(session, self._url, picture, f"&budget_ms={self._budget_ms:g}")

    def stop(self) -> None:
        self._is_over = True

    def describe(self, *steps: str) -> str:
        """Summarise the outcomes of the requests that were sent during some steps of a change."""
        replies = [reply for at, reply in self.replies if at in steps]
        in_time = [each for each in replies if each.status == 200 and 1000 * each.latency_s <= self._budget_ms]
        answered = sorted(each.latency_s for each in replies if each.status == 200)
        lost = sum(each.status not in (200, 429, 504) for each in replies)
        expected = sum(each.expected or 0.0 for each in in_time)
        return (
            f"{len(replies)} requests, lost {lost}, attainment {len(in_time) / len(replies):.4f}, "
            f"effective {expected / len(replies):.4f}, p50 {1000 * median(answered):.0f} ms, "
            f"p99 {1000 * answered[int(0.99 * len(answered))]:.0f} ms, "
            f"answers {dict(Counter(each.status for each in replies))}"
        )


def write_twins(checkpoint: str, folder: Path) -> list[Path]:
    """Write the same weights under two names."""
    loaded, paths = load_checkpoint(checkpoint), []
    for name in ("one", "other"):
        header = Header(name, loaded.config, loaded.class_names, loaded.profile, loaded.int8)
        paths.append(folder / f"{name}.safetensors")
        save_checkpoint(paths[-1], loaded.model, header, half=loaded.is_half)
    return paths


async def change(session: aiohttp.ClientSession, url: str, path: Path, load: Load) -> dict[str, Any]:
    """Change the model, wait for the end of the change and return its report."""
    load.step = "load"
    async with session.put(f"{url}/admin/model", json={"checkpoint": str(path)}) as response:
        response.raise_for_status()
    deadline = time.monotonic() + CHANGE_LIMIT_S
    while time.monotonic() < deadline:
        await asyncio.sleep(0.1)
        async with session.get(f"{url}/admin/model") as response:
            report: dict[str, Any] = (await response.json())["change"]
        load.step = report["step"]
        if report["outcome"] is not None:
            return report
    raise SystemExit("a change of the model does not end")


async def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--checkpoint", default="supervit-micro-cifar10")
    parser.add_argument("--largest", default="fixed-8-1", help="the policy that always takes the largest sub-network")
    parser.add_argument("--capacity", type=float, help="requests per second that stand for 1x; measured by default")
    parser.add_argument("--load", type=float, default=1.0)
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--pause", type=float, default=5, help="seconds without a change before each")
    parser.add_argument("--budget-ms", type=float, default=300)
    parser.add_argument("--seconds", type=float, default=10, help="without a change, and to find out what 1x is")
    options = parser.parse_args()
    pictures = read_pictures(options.images, 500)
    options.serve = ["--checkpoint", options.checkpoint]
    capacity = options.capacity or await measure_capacity(options, pictures)
    print(f"1x is {capacity:.1f} requests/s")
    with tempfile.TemporaryDirectory() as folder:
        twins = write_twins(options.checkpoint, Path(folder))
        async with server("level", options.serve) as (url, pid), connect() as session:
            await closed_loop(url, pictures, 4, SETTLE_S)
            load = Load(url, pictures, options.load * capacity, options.budget_ms)
            asyncio.get_running_loop().call_later(options.seconds, load.stop)
            await load.run()
            print(f"without a change: {load.describe('')}; {resident_mb(pid):.0f} MB")
            load = Load(url, pictures, options.load * capacity, options.budget_ms)
            sending, reports, resident = asyncio.create_task(load.run()), [], []
            for number in range(options.swaps):
                load.step = BETWEEN
                await asyncio.sleep(options.pause)
                report = await change(session, url, twins[number % 2], load)
                reports.append(report)
                resident.append(resident_mb(pid))
                why = report["message"] or f"{report['latency_ratio'] or math.nan:.2f} times as slow"
                print(
                    f"{number + 1}: {report['outcome']}, {why}, {report['seconds']} s, {resident[-1]:.0f} MB",
                    flush=True,
                )
            load.stop()
            await sending
    outcomes = dict(Counter(report["outcome"] for report in reports))
    steps = [step for step in dict.fromkeys(step for step, _ in load.replies) if step]
    print(f"{options.swaps} changes: {outcomes}, {load.describe(*(step for step in steps if step != BETWEEN))}")
    for step in steps:
        print(f"{step}: {load.describe(step)}")
    print(f"a change took {median(report['seconds'] for report in reports):.1f} s at the median")
    fifth = max(1, len(resident) // 5)
    first, last = median(resident[:fifth]), median(resident[-fifth:])
    print(f"resident: {first:.0f} MB after the first {fifth} changes, {last:.0f} MB after the last")


if __name__ == "__main__":
    uvloop.run(main())
