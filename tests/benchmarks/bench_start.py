"""From the start of a process to answers in time: `python -m tests.benchmarks.bench_start --images caltech101/test`.

A server starts without measured latencies of this machine. Its time to readiness is printed beside the time of `import
torch`, then its attainment over a minute of Poisson arrivals from that instant on, at 1x, which is what the largest
sub-network carries in a closed loop. A second such server is left idle: printed are the part of its profile that is
measured after two minutes, and how far its estimates at that time are off its final measurements. Last, a server starts
that finds these latencies.
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import uvloop

from tests.benchmarks.bench_live import Picture, measure_capacity, open_loop, poisson, read_pictures, server

WINDOW_S = 10
COMPLETE_LIMIT_S = 1200.0
POLL_INTERVAL_S = 2.0


async def get(url: str, path: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}{path}") as response:
        found: dict[str, Any] = await response.json()
        return found


async def latencies_ms(url: str) -> dict[tuple[int, float, str], float]:
    """Return the latencies that the server plans with, by trained sub-network and batch size."""
    rows = (await get(url, "/subnetworks"))["subnetworks"]
    return {
        (row["patch_grid"], row["keep_rate"], size): latency_ms
        for row in rows
        if row["is_trained"]
        for size, latency_ms in row["latency_ms"].items()
    }


async def measured_share(url: str) -> float:
    return float((await get(url, "/health/ready"))["profile_measured"])


async def first_minute(url: str, pictures: Sequence[Picture], options: argparse.Namespace) -> None:
    arrivals = poisson(options.load * options.capacity, options.seconds, 0)
    sent = await open_loop(url, pictures, arrivals, options.budget_ms)
    met = [reply.status == 200 and 1000 * reply.latency_s <= options.budget_ms for _, reply in sent]
    windows: dict[int, list[bool]] = {}
    for (at, _), is_met in zip(sent, met, strict=True):
        windows.setdefault(int(at // WINDOW_S), []).append(is_met)
    shares = ", ".join(f"{sum(each) / len(each):.3f}" for each in windows.values())
    print(f"attainment over {options.seconds:g} s: {sum(met) / len(met):.4f} of {len(met)}; by {WINDOW_S} s: {shares}")


async def left_alone(url: str, idle_s: float) -> None:
    await asyncio.sleep(idle_s)
    share, early = await measured_share(url), await latencies_ms(url)
    print(f"after {idle_s:g} idle seconds {share:.0%} of the profile is measured", flush=True)
    ends_at = time.monotonic() + COMPLETE_LIMIT_S
    while (share := await measured_share(url)) < 1 and time.monotonic() < ends_at:  # noqa: ASYNC110 - another process's
        await asyncio.sleep(POLL_INTERVAL_S)
    late = await latencies_ms(url)
    off = sorted(abs(early[cell] / late[cell] - 1) for cell in late)
    worst = f"{off[int(0.9 * len(off))]:.1%} at the 90th percentile, {off[-1]:.1%} at most"
    took_s = idle_s + COMPLETE_LIMIT_S - (ends_at - time.monotonic())
    print(f"{share:.0%} after {took_s:.0f} s; latencies were off by {median(off):.1%} at the median, {worst}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--budget-ms", type=float, default=300)
    parser.add_argument("--load", type=float, default=1.0)
    parser.add_argument("--largest", default="fixed-14-1", help="the policy that always takes the largest sub-network")
    parser.add_argument("--capacity", type=float, help="requests per second that stand for 1x; measured by default")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--idle-s", type=float, default=120)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further options of supervit serve")
    options = parser.parse_args()
    pictures = read_pictures(options.images, 500)
    options.capacity = options.capacity or await measure_capacity(options, pictures)
    print(f"1x is {options.capacity:.1f} requests/s")
    started_at = time.perf_counter()
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", "import torch"], check=True)
    print(f"import torch: {time.perf_counter() - started_at:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "another first", "later"):
            profiles = Path(folder, "used" if name == "first" else "left alone")
            started_at = time.perf_counter()
            async with server("level", [*options.serve, "--profile-folder", str(profiles)]) as (url, _):
                print(f"{name} start: ready after {time.perf_counter() - started_at:.1f} s", flush=True)
                if name == "another first":
                    await left_alone(url, options.idle_s)
                else:
                    await first_minute(url, pictures, options)


if __name__ == "__main__":
    uvloop.run(main())
