"""The open loop: each request goes out when it is due, and is timed from then on, not from when it got its turn.

So a slow server is not spared requests, nor are their waits left out (no coordinated omission), and how late the
generator itself was is known.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from service.bench.wires import Reply
from service.simulation.arrivals import Arrival


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to be sent: when and within which budgets, which photograph, and what that shows, if it is known."""

    arrival: Arrival
    photo: int
    label: str | None


@dataclass(frozen=True, slots=True)
class Exchange:
    """What became of a request.

    Attributes:
        planned: what was to be sent, and when.
        late_s: how long after that it was the generator's turn to send it.
        latency_s: from when it was due until it was answered, or refused, or nothing came.
        reply: what was said.
    """

    planned: Planned
    late_s: float
    latency_s: float
    reply: Reply

    @property
    def is_in_time(self) -> bool:
        """Whether it was answered by its deadline."""
        return self.reply.is_answer and self.latency_s <= self.planned.arrival.budget_s

    @property
    def is_right(self) -> bool:
        """Whether the answer is what the photograph shows."""
        return self.reply.is_answer and self.reply.label == self.planned.label


async def open_loop(
    plan: Sequence[Planned],
    ask: Callable[[Planned], Awaitable[Reply]],
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> list[Exchange]:
    """Send every request when it is due, and wait until each has come to an end.

    Args:
        plan: in the order of arrivals.
        ask: sends one; it raises nothing that should not end everything.
        clock: monotonic, in seconds.
        sleep: waits for so many seconds, or for others to have their turn.
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
