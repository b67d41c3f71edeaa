"""What the server costs on top of decoding and inference: `python -m tests.benchmarks.bench_server CHECKPOINT IMAGES`.

Closed loops at concurrency 1 and 16 run through a real server and, in turns, without one: with the same decoder on as
many threads, the same engine, and batches of all images decoded so far. The requests name their sub-network, so that
both do the same work. Last comes the share of a core that the idle server takes.
"""

import argparse
import asyncio
import queue
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from models.checkpoint import load_checkpoint
from models.subnetwork import SubNetwork
from service.assembly import engine_choice
from service.decoding.images import decode_image
from service.engines.factory import open_engine
from service.machine.monitor import Monitor
from service.settings import Settings
from tests.benchmarks.bench_live import Picture, ask, connect, finish_profile, read_pictures, server

CONCURRENCY = 16
LONG_BUDGET = "&budget_ms=60000"
IDLE_S = 20.0
SETTLE_S = 0.01  # for the worker threads of the other engine to fall asleep


class Bare:
    """Decoding and inference, without a server."""

    def __init__(self, checkpoint_path: Path, subnetwork: SubNetwork) -> None:
        settings, checkpoint = Settings(), load_checkpoint(checkpoint_path)
        self.engine, _ = open_engine(checkpoint, engine_choice(settings, checkpoint, Monitor().latest.cores))
        self.engine.warm_up()
        self.decode = partial(decode_image, config=checkpoint.config, max_pixels=settings.max_image_pixels)
        self.decode_threads = ThreadPoolExecutor(settings.decode_threads)
        self.max_batch_size = settings.max_batch_size
        self.subnetwork = subnetwork

    def latency(self, picture: Picture) -> float:
        """Return the seconds that one image alone takes."""
        started = time.perf_counter()
        self.engine.run(self.decode(picture.data)[None], self.subnetwork)
        return time.perf_counter() - started

    def throughput(self, pictures: Sequence[Picture], seconds: float) -> float:
        """Return the images per second with CONCURRENCY images in progress."""
        decoded: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        sent = answered = 0

        def send() -> None:
            nonlocal sent
            data = pictures[sent % len(pictures)].data
            self.decode_threads.submit(lambda: decoded.put(self.decode(data)))
            sent += 1

        for _ in range(CONCURRENCY):
            send()
        started = time.perf_counter()
        while time.perf_counter() < started + seconds:
            images = [decoded.get()]
            while len(images) < self.max_batch_size and not decoded.empty():
                images.append(decoded.get())
            self.engine.run(torch.stack(images), self.subnetwork)
            answered += len(images)
            for _ in images:
                send()
        rate = answered / (time.perf_counter() - started)
        for _ in range(sent - answered):
            decoded.get()
        return rate


async def served(url: str, pictures: Sequence[Picture], concurrency: int, query: str, seconds: float) -> list[float]:
    """Return the latency of every answer to a closed loop of `concurrency` clients."""
    taken: list[float] = []
    async with connect() as session:
        end = time.perf_counter() + seconds

        async def client(number: int) -> None:
            while time.perf_counter() < end:
                reply = await ask(session, url, pictures[(len(taken) * 7 + number) % len(pictures)], query)
                if reply.status != 200:
                    raise SystemExit(f"the server answered {reply.status}")
                taken.append(reply.latency_s)

        await asyncio.gather(*(client(number) for number in range(concurrency)))
    return taken


async def added_s(url: str, bare: Bare, pictures: Sequence[Picture], query: str, seconds: float) -> list[float]:
    """Return how much longer a lone client waits for each image: it goes through the server, and then without it."""
    added: list[float] = []
    async with connect() as session:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            picture = pictures[len(added) % len(pictures)]
            reply = await ask(session, url, picture, query)
            await asyncio.sleep(SETTLE_S)
            added.append(reply.latency_s - bare.latency(picture))
            await asyncio.sleep(SETTLE_S)
    return added


async def main() -> None:
    """Measure in turns, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--patch-grid", type=int, default=14)
    parser.add_argument("--keep-rate", type=float, default=1)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    pictures = read_pictures(options.images, 100)
    subnetwork = SubNetwork(options.patch_grid, options.keep_rate)
    bare = Bare(options.checkpoint, subnetwork)
    query = f"{LONG_BUDGET}&patch_grid={subnetwork.patch_grid}&keep_rate={subnetwork.keep_rate}"
    seconds = options.seconds
    rates, added_ms = [], []
    async with server("level", ["--checkpoint", str(options.checkpoint)]) as (url, pid):
        await finish_profile(url)
        for _ in range(options.turns):
            added_ms += [1000 * each for each in await added_s(url, bare, pictures, query, seconds)]
            crowd = len(await served(url, pictures, CONCURRENCY, query, seconds)) / seconds
            rates.append((crowd, bare.throughput(pictures, seconds)))
            print(f"{CONCURRENCY} clients {crowd:.1f}/s, bare {rates[-1][1]:.1f}/s")
        await asyncio.sleep(1)
        process = psutil.Process(pid)
        before = sum(process.cpu_times()[:2])
        await asyncio.sleep(IDLE_S)
        idle = (sum(process.cpu_times()[:2]) - before) / IDLE_S
    share = statistics.median(ours / theirs for ours, theirs in rates)
    print(f"{subnetwork}: {CONCURRENCY} clients get {share:.3f} of what decoding and inference alone reach;")
    print(f"one client waits {statistics.median(added_ms):.2f} ms longer; idle, the server takes {idle:.2%} of a core")


if __name__ == "__main__":
    asyncio.run(main())
