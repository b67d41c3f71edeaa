"""Two API keys that together exceed the server's capacity: what each of them gets and what the smaller one misses.

    python -m tests.benchmarks.bench_keys PHOTOGRAPHS --budget-ms 500 --serve --checkpoint supervit-micro-cifar10

All times are the clients'. A closed loop measures what a server carries with its cheapest sub-network. Then the same
Poisson arrivals of both keys go to a server with a key file; the arrivals of the smaller key alone, and those of both
keys, go to a server without one. A share of work is a share of the GFLOPs that the answers report as their cost. For
the smaller key, the output says how many requests were not answered in time, and how many of these were answered in
time when the key was alone. A request counts from the instant at which it was due.
"""

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from service.access.key_file import make_key
from tests.benchmarks.bench_live import SETTLE_S, poisson, read_pictures, server
from tests.benchmarks.bench_overload import (
    DRAIN_LIMIT_S,
    Answered,
    Clients,
    closed_loop,
    least_gflops,
    post,
    quantile_ms,
)

SMALLER, LARGER = 0, 1
WARM_UP_S, MEASURED_S = 3.0, 6.0  # durations of a closed loop
Pair = tuple[float, float]  # a value of the smaller key and one of the larger


@dataclass(slots=True)
class Sent:
    """A request of one of the keys, when it was due, and its outcome; times in seconds."""

    key: int
    due_at: float
    behind_s: float = 0.0
    took_s: float = 0.0
    status: int = 0
    body: bytes = b""

    def is_in_time(self, budget_s: float) -> bool:
        return self.status == 200 and self.took_s <= budget_s

    @property
    def gflops(self) -> float:
        return float(json.loads(self.body)["gflops"]) if self.status == 200 else 0.0

    @property
    def outcome(self) -> str:
        if self.status == 200 or not self.body:
            return str(self.status)
        error = json.loads(self.body)["error"]
        return f"{error['code']}: {error['details'].get('reason', '')}"


def pair(text: str) -> Pair:
    smaller, larger = map(float, text.split(":"))
    return smaller, larger


def write_keys(folder: Path, weights: Sequence[Pair]) -> tuple[Path, dict[Pair, list[str]]]:
    """Create two keys for each pair of weights; return the key file and the headers of each pair."""
    path, headers, entries = folder / "keys.toml", dict[Pair, list[str]](), list[str]()
    for number, both in enumerate(weights):
        keys = [make_key(f"{name}-{number}") for name in ("smaller", "larger")]
        entries += [f"{key.entry}weight = {weight}\n" for key, weight in zip(keys, both, strict=True)]
        headers[both] = [f"X-API-Key: {key.secret}\r\n" for key in keys]
    path.write_text("\n".join(entries))
    return path, headers


def plan(rates: Pair, seconds: float, seed: int) -> list[Sent]:
    """Draw the arrivals of each key separately, so that the smaller key's do not depend on the larger key's rate."""
    drawn = [Sent(key, at) for key, rate in enumerate(rates) for at in poisson(rate, seconds, 2 * seed + key)]
    return sorted(drawn, key=lambda sent: sent.due_at)


async def play(url: str, planned: list[Sent], images: Sequence[bytes], query: str, headers: Sequence[str]) -> None:
    """Send each request when it is due, without waiting for the others."""
    clients, clock, numbers = Clients(url), time.perf_counter, Counter[int]()
    requests = [[post(image, query, header) for image in images] for header in headers]
    started = clock()

    def answered_to(sent: Sent) -> Answered:
        def answered(status: int, body: bytes) -> None:
            sent.took_s, sent.status, sent.body = clock() - started - sent.due_at, status, body

        return answered

    for sent in planned:
        if (wait_s := started + sent.due_at - clock()) > 0:
            await asyncio.sleep(wait_s)
        sent.behind_s = clock() - started - sent.due_at
        mine = requests[sent.key]
        clients.start(mine[numbers[sent.key] % len(mine)], answered_to(sent))
        numbers[sent.key] += 1
    await clients.rest(DRAIN_LIMIT_S)
    clients.close()


def figures(sent: Sequence[Sent], budget_s: float) -> dict[str, Any]:
    work, asked, in_time = [0.0, 0.0], [0, 0], [0, 0]
    for one in sent:
        work[one.key] += one.gflops
        asked[one.key] += 1
        in_time[one.key] += one.is_in_time(budget_s)
    outcomes = Counter((one.key, one.outcome) for one in sent)
    return {
        "shares of work": [round(each / max(sum(work), 1e-9), 3) for each in work],
        "asked": asked,
        "in time": in_time,
        "smaller's outcomes": {name: count for (key, name), count in outcomes.items() if key == SMALLER},
        "larger's outcomes": {name: count for (key, name), count in outcomes.items() if key == LARGER},
        "client behind p50, p99 ms": [quantile_ms([one.behind_s for one in sent], share) for share in (0.5, 0.99)],
    }


def missed(sent: Sequence[Sent], alone: Sequence[Sent], budget_s: float) -> list[float]:
    """Return the due times of the smaller key's requests that were answered in time only when the key was alone."""
    smaller = [one for one in sent if one.key == SMALLER]
    return [
        round(one.due_at, 2)
        for one, by_itself in zip(smaller, alone, strict=True)
        if by_itself.is_in_time(budget_s) and not one.is_in_time(budget_s)
    ]


async def compare(
    urls: dict[str, str], images: Sequence[bytes], rates: Pair, headers: Sequence[str], options: argparse.Namespace
) -> None:
    query, budget_s = f"&budget_ms={options.budget_ms:g}", options.budget_ms / 1000
    for turn in range(options.turns):
        drawn = {name: plan(rates, options.seconds, options.seed + turn) for name in ("keys", "alone", "together")}
        drawn["alone"] = [one for one in drawn["alone"] if one.key == SMALLER]
        for name, planned in drawn.items():
            await play(urls[name], planned, images, query, headers if name == "keys" else ["", ""])
            await asyncio.sleep(SETTLE_S)
        for name, planned in drawn.items():
            found = {"run": name, **figures(planned, budget_s)}
            if name != "alone":
                gone = missed(planned, drawn["alone"], budget_s)
                found |= {"smaller missed that alone was met": len(gone), "due at s": gone[:20]}
            print(json.dumps(found), flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument("--budget-ms", type=float, default=500)
    parser.add_argument("--weights", type=pair, nargs="+", default=[(1, 1), (1, 3)], metavar="SMALLER:LARGER")
    parser.add_argument(
        "--loads",
        type=pair,
        nargs="+",
        default=[(0.27, 2.73), (0.7, 7)],
        metavar="SMALLER:LARGER",
        help="of what the server carries; by default three times of it, and more than any share of it of each",
    )
    parser.add_argument("--seconds", type=float, default=20, help="of each run")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=16, help="clients of the closed loop")
    parser.add_argument("--carried", type=float, help="requests per second that stand for 1; measured by default")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further options of supervit serve")
    options = parser.parse_args()
    images = [picture.data for picture in read_pictures(options.images, 200)]
    with tempfile.TemporaryDirectory() as folder:
        keys, headers = write_keys(Path(folder), options.weights)
        async with AsyncExitStack() as stack:
            with_keys, _ = await stack.enter_async_context(server("level", ["--keys", str(keys), *options.serve]))
            without, _ = await stack.enter_async_context(server("level", options.serve))
            query = f"&budget_ms=60000&budget_gflops={await least_gflops(without)}"
            cheapest = [post(image, query) for image in images]
            await closed_loop(without, cheapest, 4, WARM_UP_S)
            with_key = [post(image, query, headers[options.weights[0]][SMALLER]) for image in images]
            await closed_loop(with_keys, with_key, 4, WARM_UP_S)
            urls = {"keys": with_keys, "alone": without, "together": without}
            for weights, loads in itertools.product(options.weights, options.loads):
                carried = options.carried or await closed_loop(without, cheapest, options.concurrency, MEASURED_S)
                print(json.dumps({"weights": weights, "loads": loads, "1 is, per s": round(carried, 1)}), flush=True)
                rates = loads[SMALLER] * carried, loads[LARGER] * carried
                await compare(urls, images, rates, headers[weights], options)


if __name__ == "__main__":
    uvloop.run(main())
