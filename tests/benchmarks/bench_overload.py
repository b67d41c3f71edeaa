"""More requests than the server carries, by the client's clock: what is answered in time, and how long rejections take.

    python -m tests.benchmarks.bench_overload PHOTOGRAPHS --budget-ms 100 --serve --checkpoint supervit-micro-cifar10

First a closed loop measures what the server carries with its cheapest sub-network: enough clients to keep it busy, each
waiting for its answer. Then requests arrive as a Poisson process at multiples of that rate, however many are still
waiting. Goodput is the rate of answers in time over the rate of the closed loop. A request counts from the instant at
which it was due, so that a client that falls behind hides nothing; how far the client fell behind is printed.
"""

import argparse
import asyncio
import json
import random
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import uvloop

from tests.benchmarks.bench_live import read_pictures, resident_mb, server

LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
CLOSED_LOOP_S = 10.0
DRAIN_LIMIT_S = 10.0
RECOVERY_LIMIT_S = 30.0
PROBE_S = 0.5
CPU_TICK_S = 0.01


Answered = Callable[[int, bytes], None]  # called with the status and the body; status 0 if the connection was lost


class Connection(asyncio.Protocol):
    """A keep-alive connection that sends one request at a time and parses only the status and length of an answer."""

    def __init__(self) -> None:
        self._buffer = b""
        self._answered: Answered | None = None
        self._transport: asyncio.Transport | None = None
        self.is_open = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # a socket's is one
        self._transport, self.is_open = transport, True

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        found = LENGTH.search(self._buffer, 0, end)
        length = int(found.group(1)) if found else 0
        if len(self._buffer) < end + 4 + length:
            return
        status, body = int(self._buffer[9:12]), self._buffer[end + 4 : end + 4 + length]
        self._buffer = self._buffer[end + 4 + length :]
        self._tell(status, body)

    def connection_lost(self, _: Exception | None) -> None:
        self.is_open = False
        self._tell(0, b"")

    def ask(self, request: bytes, answered: Answered) -> None:
        assert self._transport is not None
        self._answered = answered
        self._transport.write(request)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _tell(self, status: int, body: bytes) -> None:
        answered, self._answered = self._answered, None
        if answered is not None:
            answered(status, body)


class Clients:
    """Keeps the free connections, and opens another if none is free.

    The clients share the server's cores, so their cost per request is kept small: no task and no future.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._free: deque[Connection] = deque()
        self._opening: set[asyncio.Task[None]] = set()
        self._num_asked, self._all_answered = 0, asyncio.Event()
        self._all_answered.set()

    def start(self, request: bytes, answered: Answered) -> None:
        """Send a request, at once if a connection is free."""
        self._num_asked += 1
        self._all_answered.clear()
        while self._free:
            connection = self._free.pop()
            if connection.is_open:
                self._send(connection, request, answered)
                return
        opening = asyncio.create_task(self._open(request, answered))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request and wait for its answer."""
        future: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self.start(request, lambda status, body: future.set_result((status, body)))
        return await future

    async def rest(self, within_s: float) -> None:
        """Wait until all requests are answered, for at most `within_s` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._all_answered.wait()

    def close(self) -> None:
        for connection in self._free:
            connection.close()

    async def _open(self, request: bytes, answered: Answered) -> None:
        try:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(Connection, self._host, self._port)
        except OSError:
            self._end(answered, 0, b"")
        else:
            self._send(connection, request, answered)

    def _send(self, connection: Connection, request: bytes, answered: Answered) -> None:
        def free(status: int, body: bytes) -> None:
            self._free.append(connection)
            self._end(answered, status, body)

        connection.ask(request, free)

    def _end(self, answered: Answered, status: int, body: bytes) -> None:
        self._num_asked -= 1
        if not self._num_asked:
            self._all_answered.set()
        answered(status, body)


@dataclass
class Tally:
    """The outcomes of the requests of a phase; times in seconds."""

    sent: int = 0
    in_time: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    refused: list[tuple[float, bytes]] = field(default_factory=list)  # seconds to the rejection, and its body
    answers_s: list[float] = field(default_factory=list)
    behind_s: list[float] = field(default_factory=list)

    @property
    def rejected_s(self) -> dict[str, list[float]]:
        by_reason: dict[str, list[float]] = {}
        for took_s, body in self.refused:
            by_reason.setdefault(json.loads(body)["error"]["details"]["reason"], []).append(took_s)
        return by_reason


def post(image: bytes, query: str, header: str = "") -> bytes:
    head = f"POST /classify?top_k=1{query} HTTP/1.1\r\nHost: server\r\nContent-Type: image/jpeg\r\n{header}"
    return f"{head}Content-Length: {len(image)}\r\n\r\n".encode() + image


async def closed_loop(url: str, requests: Sequence[bytes], concurrency: int, seconds: float) -> float:
    """Return how many requests per second are answered in a closed loop of `concurrency` clients."""
    clients, answered = Clients(url), 0
    started = time.perf_counter()

    async def client(number: int) -> None:
        nonlocal answered
        while time.perf_counter() < started + seconds:
            status, _ = await clients.ask(requests[(number + answered) % len(requests)])
            answered += status == 200

    await asyncio.gather(*(client(number) for number in range(concurrency)))
    clients.close()
    return answered / (time.perf_counter() - started)


async def open_loop(url: str, requests: Sequence[bytes], rate: float, seconds: float, budget_s: float) -> Tally:
    """Send requests as a Poisson process, without waiting for answers."""
    clients, tally, rng = Clients(url), Tally(), random.Random(0)
    clock = time.perf_counter

    def sent(due_at: float) -> Answered:
        def answered(status: int, body: bytes) -> None:
            took_s = clock() - due_at
            tally.statuses[status] += 1
            if status == 200:
                tally.answers_s.append(took_s)
                tally.in_time += took_s <= budget_s
            elif status == 429:
                tally.refused.append((took_s, body))

        return answered

    started = at = clock()
    while (at := at + rng.expovariate(rate)) < started + seconds:
        if (wait := at - clock()) > 0:
            await asyncio.sleep(wait)
        tally.sent += 1
        tally.behind_s.append(clock() - at)
        clients.start(requests[tally.sent % len(requests)], sent(at))
    await clients.rest(DRAIN_LIMIT_S)
    tally.statuses[0] += tally.sent - tally.statuses.total()  # requests without an answer
    clients.close()
    return tally


async def metric(url: str, name: str) -> float:
    """Sum the samples of a metric whose name and labels begin with `name`."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


async def least_gflops(url: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/subnetworks") as response:
        return min(float(each["gflops"]) for each in (await response.json())["subnetworks"])


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * CPU_TICK_S


def quantile_ms(values: Sequence[float], share: float) -> float | None:
    """Return a quantile of values in seconds, in milliseconds."""
    return round(1000 * sorted(values)[min(len(values) - 1, int(share * len(values)))], 2) if values else None


async def phase(
    url: str, pid: int, requests: Sequence[bytes], load: float, carried: float, options: argparse.Namespace
) -> dict[str, object]:
    seconds = options.seconds
    met = await metric(url, 'supervit_deadlines_total{result="met"}')
    used_s, own_s = cpu_s(pid), time.process_time()
    tally = await open_loop(url, requests, load * carried, seconds, options.budget_ms / 1000)
    used_s, own_s = cpu_s(pid) - used_s, time.process_time() - own_s
    counted = await metric(url, 'supervit_deadlines_total{result="met"}') - met
    return {
        "load": load,
        "sent": tally.sent,
        "goodput over the closed loop's": round(tally.in_time / seconds / carried, 3),
        "in time": tally.in_time,
        "counted as met": counted,
        "statuses": dict(tally.statuses),
        "answers p50, p99 ms": [quantile_ms(tally.answers_s, share) for share in (0.5, 0.99)],
        "refusals p50, p99 ms": [quantile_ms([took_s for took_s, _ in tally.refused], share) for share in (0.5, 0.99)],
        "by reason": {
            reason: [len(times_s), *(quantile_ms(times_s, share) for share in (0.5, 0.99))]
            for reason, times_s in tally.rejected_s.items()
        },
        "client behind p50, p99 ms": [quantile_ms(tally.behind_s, share) for share in (0.5, 0.99)],
        "server CPU ms per request": round(1000 * used_s / max(1, tally.sent), 3),
        "client CPU ms per request": round(1000 * own_s / max(1, tally.sent), 3),
        "resident MB": round(resident_mb(pid)),
    }


async def seconds_to_quality(url: str, request: bytes, accuracy: float) -> float | None:
    """Return the seconds until an answer's expected accuracy reaches `accuracy`; None after RECOVERY_LIMIT_S."""
    clients, started = Clients(url), time.perf_counter()
    while (took_s := time.perf_counter() - started) < RECOVERY_LIMIT_S:
        status, body = await clients.ask(request)
        if status == 200 and json.loads(body)["subnetwork"]["expected_accuracy"] >= accuracy:
            break
        await asyncio.sleep(PROBE_S)  # more frequent probes would be load that the server plans for
    clients.close()
    return round(took_s, 2) if took_s < RECOVERY_LIMIT_S else None


async def best_accuracy(url: str, request: bytes) -> float:
    """Return the best expected accuracy of a few answers from an idle server, which is what it gives without load."""
    clients, found = Clients(url), []
    for _ in range(4):
        await asyncio.sleep(PROBE_S)
        _, body = await clients.ask(request)
        found.append(float(json.loads(body)["subnetwork"]["expected_accuracy"]))
    clients.close()
    return max(found)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument("--budget-ms", type=float, default=100)
    parser.add_argument("--loads", type=float, nargs="+", default=[1, 3])
    parser.add_argument("--seconds", type=float, default=20, help="of each load")
    parser.add_argument("--concurrency", type=int, default=16, help="clients of the closed loop")
    parser.add_argument("--carried", type=float, help="requests per second that stand for 1; measured by default")
    parser.add_argument("--policy", default="level")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further options of supervit serve")
    options = parser.parse_args()
    images = [picture.data for picture in read_pictures(options.images, 200)]
    requests = [post(image, f"&budget_ms={options.budget_ms:g}") for image in images]
    async with server(options.policy, options.serve) as (url, pid):
        cheapest = [post(image, f"&budget_ms=60000&budget_gflops={await least_gflops(url)}") for image in images]
        await closed_loop(url, cheapest, 4, 1)
        full = await best_accuracy(url, requests[0])
        carried = options.carried or await closed_loop(url, cheapest, options.concurrency, CLOSED_LOOP_S)
        print(json.dumps({"closed loop, requests/s": round(carried, 1)}), flush=True)
        for load in options.loads:
            found = await phase(url, pid, requests, load, carried, options)
            found["full quality again after s"] = await seconds_to_quality(url, requests[0], full)
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
