"""Checks whether a queue served by deadline, in the largest batches that fit, is in time. Decides nothing."""

import math
from bisect import bisect_right
from collections.abc import Sequence

from service.scheduling.state import SchedulerState
from service.scheduling.variants import Latencies


def meets_deadlines(
    state: SchedulerState,
    deadlines: Sequence[float],
    variant: int,
    max_size: int,
    *,
    planned: int | None = None,
    after_s: float = 0.0,
) -> bool:
    """Return whether serving all of `deadlines`, ascending, with one variant in the largest batches meets each of them.

    The slowdown is the one that few batches exceed. Many batches in a row exceed it more rarely still: so the times add
    up as expected values, and the deviations, which are independent, as the root of the sum of squares.

    Args:
        state: the state at this moment.
        deadlines: the deadlines of the requests to serve.
        variant: index of the variant.
        max_size: largest size of a batch.
        planned: how many requests are planned, in batches; the rest are assumed to be served at the same pace. By
            default all are planned.
        after_s: seconds from now until the engine is free.
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
    return _rest_is_in_time(state, deadlines, count, start_at, time)


def meets_deadlines_mixed(
    state: SchedulerState,
    deadlines: Sequence[float],
    targets: Sequence[int],
    guard_s: float,
    *,
    after_s: float = 0.0,
) -> bool:
    """Like `meets_deadlines`, where each request has its own target: a group pays for one batch per target in it.

    Requests beyond `targets` are assumed to be served at the pace of those before them.
    """
    latencies_s, slowdown, max_size = state.latencies_s, state.slowdown, state.max_batch_size
    likely, start_at = slowdown / state.tail_factor, state.now + after_s
    busy, spread, squares, margin = likely * state.overhead_factor, slowdown - likely, 0.0, 0.0
    index, count, time = 0, len(targets), start_at
    while index < count:
        # At least the first request of a group must fit its guard, to the last digit: nothing is scaled up and down.
        guard = max(guard_s / slowdown, latencies_s[targets[index]][0])
        room = min((deadlines[index] - time - margin) / slowdown, guard)
        sizes, cost = take_group(latencies_s, targets[index : index + max_size], room)
        if not cost:
            return False
        time += cost * busy
        squares += (cost * spread) ** 2
        margin = math.sqrt(squares)
        index += sum(sizes)
    return _rest_is_in_time(state, deadlines, count, start_at, time)


def _rest_is_in_time(
    state: SchedulerState, deadlines: Sequence[float], count: int, start_at: float, time: float
) -> bool:
    """Return whether the requests beyond the first `count`, served from `start_at` to `time`, are in time as well."""
    if count == len(deadlines):
        return True
    pace, step = (time - start_at) / count, state.max_batch_size
    return all(time + pace * (index - count) <= deadlines[index] for index in range(count, len(deadlines), step))


def exceeds_capacity(state: SchedulerState, rate: float) -> bool:
    """Return whether arrivals at this rate exceed the capacity of the cheapest level in full batches."""
    full_s = state.latency_s(0, state.max_batch_size) * state.overhead_factor
    return rate * full_s > state.max_batch_size


def is_sustained_overload(state: SchedulerState) -> bool:
    """Return whether arrivals have exceeded the capacity of the cheapest level for long, and still do."""
    return exceeds_capacity(state, min(state.arrival_rate, state.sustained_rate))


def take_group(latencies_s: Latencies, targets: Sequence[int], room: float) -> tuple[list[int], float]:
    """Fit requests from the front into the room; return the batch size of each variant and the cost of all batches."""
    sizes, cost = [0] * len(latencies_s), 0.0
    for index in targets:
        by_batch_s, size = latencies_s[index], sizes[index]
        more = by_batch_s[size] - by_batch_s[size - 1] if size else by_batch_s[0]
        if cost + more > room:
            break
        sizes[index] = size + 1
        cost += more
    return sizes, cost
