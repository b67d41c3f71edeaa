"""What Ray Serve costs: `python -m tests.benchmarks.bench_ray CHECKPOINT IMAGES`.

The same app under plain uvicorn, as one replica behind Ray's HAProxy and as one behind Ray's own proxy, in turns:
closed loops of 16 clients and of one. The requests name their sub-network, so that all do the same work, with as many
threads in the engine. Needs `pip install '.[ray]'`.
"""

import argparse
import asyncio
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from models.subnetwork import SubNetwork
from tests.benchmarks.bench_live import read_pictures, server
from tests.benchmarks.bench_server import CONCURRENCY, PATIENT, served
from tests.deploy.ray_cluster import environment, ray_cluster, serve_config

SETTLE_S = 2.0
PORT = 8017
WAYS = {"uvicorn": None, "Ray, HAProxy": environment(), "Ray's own proxy": {}}


@asynccontextmanager
async def served_by(way: str, checkpoint: Path, threads: int) -> AsyncIterator[str]:
    """Serve in one of the WAYS; yields the URL."""
    variables = WAYS[way]
    if variables is None:
        async with server("level", ["--checkpoint", str(checkpoint), "--threads", str(threads)]) as (url, _):
            yield url
        return
    config = serve_config(PORT, replicas=1, checkpoint=str(checkpoint), threads=threads, log_level="warning")
    running = ray_cluster(config, variables)
    cluster = await asyncio.to_thread(running.__enter__)
    try:
        yield cluster.url
    finally:
        await asyncio.to_thread(running.__exit__, None, None, None)


async def main() -> None:
    """Measure in turns, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--patch-grid", type=int, default=8)
    parser.add_argument("--keep-rate", type=float, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    pictures = read_pictures(options.images, 100)
    checkpoint = options.checkpoint.resolve()
    subnetwork = SubNetwork(options.patch_grid, options.keep_rate)
    query = f"{PATIENT}&patch_grid={subnetwork.patch_grid}&keep_rate={subnetwork.keep_rate}"
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.turns):
        for way in WAYS:
            async with served_by(way, checkpoint, options.threads) as url:
                await served(url, pictures, CONCURRENCY, query, SETTLE_S)
                rates[way].append(
                    len(await served(url, pictures, CONCURRENCY, query, options.seconds)) / options.seconds
                )
                alone = statistics.median(await served(url, pictures, 1, query, options.seconds))
            print(
                f"{way:16} {rates[way][-1]:7.1f}/s for {CONCURRENCY} clients, {1000 * alone:6.2f} ms for one",
                flush=True,
            )
    for way in list(WAYS)[1:]:
        share = statistics.median(ray / plain for ray, plain in zip(rates[way], rates["uvicorn"], strict=True))
        print(f"{way}: {share:.2f} of what plain uvicorn answers")


if __name__ == "__main__":
    asyncio.run(main())
