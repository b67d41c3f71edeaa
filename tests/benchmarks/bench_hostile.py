"""Honest traffic beside hostile images and connections, one kind at a time, against one real server.

    python -m tests.benchmarks.bench_hostile PHOTOGRAPHS --serve --checkpoint supervit-micro-cifar10

Attainment is measured by the client. Memory is the server's largest resident set during each attack.
"""

import argparse
import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import uvloop

from tests.benchmarks.bench_live import Picture, open_loop, poisson, read_pictures, resident_mb, server
from tests.benchmarks.hostile import CONNECTIONS, IMAGES

SAMPLE_INTERVAL_S = 0.1
COUNTS = {"pipeline-without-reading": [16], "drip": [1100], "silence": [2200], "phone-jpeg": [8, 16, 32, 64]}
FEW = [2, 4, 16]


async def largest_resident_mb(pid: int) -> float:
    """Sample the resident set until cancelled, then return the largest."""
    largest = 0.0
    try:
        while True:
            largest = max(largest, resident_mb(pid))
            await asyncio.sleep(SAMPLE_INTERVAL_S)
    except asyncio.CancelledError:
        return largest


async def beside(
    name: str, count: int, url: str, pid: int, pictures: Sequence[Picture], options: argparse.Namespace
) -> dict[str, object]:
    command = [sys.executable, "-m", "tests.benchmarks.hostile", name, url, str(count), str(options.seconds + 2)]
    attack = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert attack.stdout is not None
    await attack.stdout.readline()  # the attack is ready
    await asyncio.sleep(1)
    looking = asyncio.create_task(largest_resident_mb(pid))
    await asyncio.sleep(0)
    arrivals = poisson(options.rate, options.seconds, options.seed)
    sent = await open_loop(url, pictures, arrivals, options.budget_ms)
    looking.cancel()
    await attack.wait()
    replies = [reply for _, reply in sent]
    in_time = [reply for reply in replies if reply.status == 200 and reply.latency_s <= options.budget_ms / 1000]
    return {
        "attack": name,
        "at a time": count,
        "in time": f"{len(in_time) / len(replies):.2%}",
        "statuses": dict(Counter(reply.status for reply in replies)),
        "largest resident set": f"{await looking:.0f} MB",
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of photographs, for the honest requests")
    parser.add_argument("--rate", type=float, default=50, help="honest requests per second")
    parser.add_argument("--budget-ms", type=float, default=500)
    parser.add_argument("--seconds", type=float, default=10, help="of each attack")
    parser.add_argument("--only", nargs="+", choices=[*IMAGES, *CONNECTIONS], default=[*IMAGES, *CONNECTIONS])
    parser.add_argument("--count", type=int, nargs="+", help="how many at a time; by default what makes each hurt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further options of supervit serve")
    options = parser.parse_args()
    pictures = read_pictures(options.images, 100)
    async with server("level", options.serve) as (url, pid):
        alone = await open_loop(url, pictures, poisson(options.rate, options.seconds, options.seed), options.budget_ms)
        met = [reply for _, reply in alone if reply.status == 200 and reply.latency_s <= options.budget_ms / 1000]
        print(json.dumps({"attack": "none", "in time": f"{len(met) / len(alone):.2%}"}), flush=True)
        for name in options.only:
            for count in options.count or COUNTS.get(name, FEW):
                print(json.dumps(await beside(name, count, url, pid, pictures, options)), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
