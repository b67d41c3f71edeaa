"""What workers and Ray Serve gain and cost: `python -m tests.benchmarks.bench_processes CHECKPOINT IMAGES`.

The same app runs as one server, as two workers behind one port, as one and two replicas behind Ray's HAProxy, and as
one replica behind Ray's own proxy, in turns, under closed loops of 16 clients and of one. The requests name their
sub-network, so that all do the same work, with one thread in every engine. Needs `pip install '.[ray]'`.
"""

import argparse
import asyncio
import statistics
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from models.subnetwork import SubNetwork
from tests.benchmarks.bench_live import read_pictures, server
from tests.benchmarks.bench_server import CONCURRENCY, LONG_BUDGET, served
from tests.deploy.ray_cluster import environment, ray_cluster, serve_config

SETTLE_S = 2.0
PORT = 8017


@dataclass(frozen=True, slots=True)
class Deployment:
    """A number of processes, behind one socket or, with these environment variables, on Ray."""

    processes: int
    ray: Mapping[str, str] | None = None


PLAIN = "one server"
WAYS = {
    PLAIN: Deployment(1),
    "two workers": Deployment(2),
    "one replica behind HAProxy": Deployment(1, environment()),
    "two replicas behind HAProxy": Deployment(2, environment()),
    "one replica behind Ray's own proxy": Deployment(1, {}),
}


@asynccontextmanager
async def served_in(way: Deployment, checkpoint: Path) -> AsyncIterator[str]:
    """Serve the checkpoint in one of the ways; yield the URL."""
    if way.ray is None:
        options = ["--checkpoint", str(checkpoint), "--threads", "1", "--workers", str(way.processes)]
        async with server("level", options) as (url, _):
            yield url
        return
    config = serve_config(PORT, way.processes, checkpoint=str(checkpoint), threads=1, log_level="warning")
    running = ray_cluster(config, way.ray)
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
    parser.add_argument("--ways", nargs="+", choices=[name for name in WAYS if name != PLAIN], default=list(WAYS)[1:])
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    pictures = read_pictures(options.images, 100)
    checkpoint, ways = options.checkpoint.resolve(), [PLAIN, *options.ways]
    subnetwork = SubNetwork(options.patch_grid, options.keep_rate)
    query = f"{LONG_BUDGET}&patch_grid={subnetwork.patch_grid}&keep_rate={subnetwork.keep_rate}"
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.turns):
        for way in ways:
            async with served_in(WAYS[way], checkpoint) as url:
                await served(url, pictures, CONCURRENCY, query, SETTLE_S)
                crowd = await served(url, pictures, CONCURRENCY, query, options.seconds)
                alone = statistics.median(await served(url, pictures, 1, query, options.seconds))
            rates[way].append(len(crowd) / options.seconds)
            print(
                f"{way:36}{rates[way][-1]:8.1f}/s for {CONCURRENCY} clients, {1000 * alone:6.2f} ms for one", flush=True
            )
    for way in ways[1:]:
        share = statistics.median(other / plain for other, plain in zip(rates[way], rates[PLAIN], strict=True))
        print(f"{way}: {share:.2f} of what {PLAIN} answers")


if __name__ == "__main__":
    asyncio.run(main())
