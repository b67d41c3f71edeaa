"""Whether a queue that is served by deadline, in the largest batches that fit, is in time. Decides nothing."""

import math
from bisect import bisect_right
from collections.abc import Sequence

from service.scheduling.state import SchedulerState
from service.scheduling.variants import Latencies


def clears(
    state: SchedulerState,
    deadlines: Sequence[float],
    variant: int,
    max_size: int,
    *,
    planned: int | None = None,
    after_s: float = 0.0,
) -> bool:
    """Whether serving all of `deadlines`, ascending, with one variant in the largest batches is in time for all.

    The slowdown is the one that few batches exceed. That many in a row do is less likely still: their time adds up as
    it probably will be, and their deviations, independent of each other, as the root of the sum of squares.

    Args:
        state: at this moment.
        deadlines: of what is served.
        variant: its index.
        max_size: of a batch.
        planned: how many are looked at; those beyond them are taken to go at their pace. By default all are.
        after_s: from now until the engine is free.
    """
    by_batch_s, slowdown, start_at = state.latencies_s[variant], state.slowdown, state.now + after_s
    likely = slowdown / state.tail_factor
    busy, spread, squares, margin = likely * state.overhead_factor, slowdown - likely, 0.0, 0.0
    index, count, time = 0, len(deadlines) if planned is None else min(planned, len(deadlines)), start_at
    while index < count:
        size = bisect_right(by_batch_s, (deadlines[index] - time - margin) / slowdown, 0, max_size)
        if size == 0:
            return False
        if size > count - index:
            size = count - index
        seconds = by_batch_s[size - 1]
        time += seconds * busy
        squares += (seconds * spread) ** 2
        margin = math.sqrt(squares)
        index += size
    return _goes_on(state, deadlines, count, start_at, time)


def clears_mixed(
    state: SchedulerState,
    deadlines: Sequence[float],
    targets: Sequence[int],
    guard_s: float,
    *,
    after_s: float = 0.0,
) -> bool:
    """As `clears`, where each request has a target of its own: a group pays for one batch per target in it.

    Those beyond the targets are taken to go at the pace of those before them.
    """
    latencies_s, slowdown, max_size = state.latencies_s, state.slowdown, state.max_batch_size
    likely, start_at = slowdown / state.tail_factor, state.now + after_s
    busy, spread, squares, margin = likely * state.overhead_factor, slowdown - likely, 0.0, 0.0
    index, count, time = 0, len(targets), start_at
    while index < count:
        room = min(deadlines[index] - time - margin, max(guard_s, latencies_s[targets[index]][0] * slowdown)) / slowdown
        sizes, cost = take_group(latencies_s, targets[index : index + max_size], room)
        if not cost:
            return False
        time += cost * busy
        squares += (cost * spread) ** 2
        margin = math.sqrt(squares)
        index += sum(sizes)
    return _goes_on(state, deadlines, count, start_at, time)


def _goes_on(state: SchedulerState, deadlines: Sequence[float], count: int, start_at: float, time: float) -> bool:
    """Whether those beyond the first `count`, which were served from one instant to the other, are in time as well."""
    if count == len(deadlines):
        return True
    pace, step = (time - start_at) / count, state.max_batch_size
    return all(time + pace * (index - count) <= deadlines[index] for index in range(count, len(deadlines), step))


def exceeds_capacity(state: SchedulerState, rate: float) -> bool:
    """Whether more would arrive at this rate than even the cheapest level carries in full batches."""
    full_s = state.latency_s(0, state.max_batch_size) * state.overhead_factor
    return rate * full_s > state.max_batch_size


def is_sustained_overload(state: SchedulerState) -> bool:
    """Whether for long more has come, and still comes, than even the cheapest level carries."""
    return exceeds_capacity(state, min(state.arrival_rate, state.sustained_rate))


def take_group(latencies_s: Latencies, targets: Sequence[int], room: float) -> tuple[list[int], float]:
    """Take from the front what fits the room: how many of each variant, and the cost of a batch of each."""
    sizes, cost = [0] * len(latencies_s), 0.0
    for index in targets:
        by_batch_s, size = latencies_s[index], sizes[index]
        more = by_batch_s[size] - by_batch_s[size - 1] if size else by_batch_s[0]
        if cost + more > room:
            break
        sizes[index] = size + 1
        cost += more
    return sizes, cost
