"""Our server compared with others on the same weights: `python -m tests.benchmarks.bench_peers CHECKPOINT IMAGES`.

The other servers, in `peers`, are built as in their documentation: two processes of one thread that decode as ours does
and run eager PyTorch at the largest sub-network, with batching if the server offers it. Closed loops run against one
server at a time, in turns, because the speed of a shared machine drifts. Needs `pip install mosec litserve`; servers
that are not installed are left out.
"""

import argparse
import asyncio
import base64
import importlib.util
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from models.checkpoint import load_checkpoint
from models.subnetwork import SubNetwork
from tests.benchmarks.bench_live import connect, read_pictures, server

START_LIMIT_S = 120
SETTLE_S = 2.0
ENDPOINTS = {"mosec": "/inference", "litserve": "/predict", "fastapi": "/classify"}

Encode = Callable[[bytes], bytes]


@asynccontextmanager
async def peer(name: str, checkpoint: Path) -> AsyncIterator[str]:
    """Run a peer; yield the URL of its endpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", f"tests.benchmarks.peers.{name}_app", "--port", str(port)]
    environment = os.environ | {"PEER_CHECKPOINT": str(checkpoint)}
    process = await asyncio.to_thread(
        subprocess.Popen, command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield f"http://127.0.0.1:{port}{ENDPOINTS[name]}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


async def closed_loop(url: str, bodies: Sequence[bytes], concurrency: int, seconds: float) -> list[float]:
    """Return the latencies of the answers to a closed loop of `concurrency` clients, after SETTLE_S seconds."""
    taken: list[float] = []
    headers = {"Content-Type": "application/json" if bodies[0].startswith(b"{") else "application/octet-stream"}
    async with connect() as session:
        await until_it_answers(session, url, bodies[0], headers)
        began = time.perf_counter()

        async def client(number: int) -> None:
            while (started := time.perf_counter()) < began + SETTLE_S + seconds:
                body = bodies[(7 * len(taken) + number) % len(bodies)]
                async with session.post(url, data=body, headers=headers) as response:
                    await response.read()
                    if response.status != 200:
                        raise SystemExit(f"{url} answered {response.status}")
                if started > began + SETTLE_S:
                    taken.append(time.perf_counter() - started)

        await asyncio.gather(*(client(number) for number in range(concurrency)))
    return taken


async def until_it_answers(session: aiohttp.ClientSession, url: str, body: bytes, headers: dict[str, str]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            async with session.post(url, data=body, headers=headers) as response:
                if response.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        if time.monotonic() > deadline:
            raise SystemExit(f"{url} did not become ready")
        await asyncio.sleep(0.2)


def as_json(image: bytes) -> bytes:
    return json.dumps({"image": base64.b64encode(image).decode()}).encode()


async def main() -> None:
    """Measure in turns, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    images = [picture.data for picture in read_pictures(options.images, 100)]
    checkpoint = load_checkpoint(options.checkpoint)
    config = checkpoint.config
    precisions = ("int8", "float32") if checkpoint.int8 else ("auto",)
    peers = [name for name in ENDPOINTS if importlib.util.find_spec(name)]
    ours = (config.largest, SubNetwork(config.largest.patch_grid, config.keep_rates[0]))
    rates: dict[str, list[float]] = {}

    async def measure(name: str, url: str, encode: Encode = bytes) -> None:
        bodies = [encode(image) for image in images]
        taken = await closed_loop(url, bodies, options.concurrency, options.seconds)
        rates.setdefault(name, []).append(len(taken) / options.seconds)
        print(f"{name:42}{rates[name][-1]:8.1f}/s  p50 {1000 * statistics.median(taken):7.1f} ms", flush=True)

    for _ in range(options.turns):
        for precision in precisions:
            arguments = ["--checkpoint", str(options.checkpoint), "--precision", precision]
            async with server("level", arguments) as (url, _pid):
                for subnetwork in ours:
                    query = f"budget_ms=60000&patch_grid={subnetwork.patch_grid}&keep_rate={subnetwork.keep_rate}"
                    await measure(f"ours, {precision}, {subnetwork}", f"{url}/classify?{query}")
        for name in peers:
            async with peer(name, options.checkpoint) as url:
                await measure(name, url, as_json if name == "litserve" else bytes)
    own = [name for name in rates if name not in peers]
    if precisions[1:]:
        for first, second in zip(own[: len(ours)], own[len(ours) :], strict=True):
            print(f"{first}: {ratio(rates[first], rates[second]):.2f} times as many as {second}")
    if peers:
        best = max(peers, key=lambda name: statistics.median(rates[name]))
        for name in own:
            print(f"{name}: {ratio(rates[name], rates[best]):.2f} times as many as {best}, the best of the others")


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median over the turns of the ratio of `ours` to `theirs`."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    asyncio.run(main())
