"""The open loop: each request is sent when it is due, and timed from then on, not from when it was sent.

A slow server is thus not spared requests, their waits are not left out (no coordinated omission), and the lateness of
the generator itself is known.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from service.bench.client_protocols import Reply
from service.simulation.arrivals import Arrival


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to send: its arrival with its budgets, the index of its photograph, and the label of that, if known."""

    arrival: Arrival
    photo: int
    label: str | None


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and its outcome.

    Attributes:
        planned: the request as it was planned.
        late_s: time from when the request was due until the generator came to send it.
        latency_s: time from when the request was due until its answer, its refusal or its failure.
        reply: the reply to it, or why there was none.
    """

    planned: Planned
    late_s: float
    latency_s: float
    reply: Reply

    @property
    def is_in_time(self) -> bool:
        """Whether the request was answered by its deadline."""
        return self.reply.is_answer and self.latency_s <= self.planned.arrival.budget_s

    @property
    def is_right(self) -> bool:
        """Whether the answer is the label of the photograph."""
        return self.reply.is_answer and self.reply.label == self.planned.label


async def open_loop(
    plan: Sequence[Planned],
    ask: Callable[[Planned], Awaitable[Reply]],
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> list[Exchange]:
    """Send every request when it is due, and wait until all have ended.

    Args:
        plan: the requests in the order of their arrivals.
        ask: sends a request and returns the reply; an exception that it raises ends the whole loop.
        clock: monotonic, in seconds.
        sleep: waits for so many seconds; for 0, yields to the event loop.
    """
    started_at = clock()

    async def exchange(planned: Planned) -> Exchange:
        due_at = started_at + planned.arrival.at
        late_s = clock() - due_at
        reply = await ask(planned)
        return Exchange(planned, late_s, clock() - due_at, reply)

    async with asyncio.TaskGroup() as group:
        tasks = []
        for planned in plan:
            await sleep(max(0.0, started_at + planned.arrival.at - clock()))
            tasks.append(group.create_task(exchange(planned)))
    return [task.result() for task in tasks]
