"""Checks whether the queue and the forecast arrivals are answered in time at a level. Chooses no level."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import cycle, islice
from operator import itemgetter

from service.scheduling.feasibility import meets_deadlines, meets_deadlines_mixed, take_group
from service.scheduling.state import QueuedRequest, RequestConstraints, SchedulerState

FORECAST_S = 0.25
# These bound the time of a decision, however long the queue is.
MAX_EXPECTED = 96
MAX_PLANNED = 128  # the most urgent requests, where each must be planned; the rest are planned in later decisions
MARGIN = 1.05
MIN_ARRIVALS_TO_GUARD = (
    0.3  # arrivals per longest single inference above which the plan leaves time for the next request
)


class Plan:
    """The queue and the forecast arrivals; built once per decision, queried in each step of the bisection.

    Attributes:
        state: the state at this moment, with the slowdown to plan with.
        queue: the requests that wait, earliest deadline first.
        guard_s: the longest batch after which a request that arrives during it can still be answered.
        expected: constraints of the forecast arrivals, each like those of a recent request.
        deadlines: deadlines of the queue and the forecast arrivals, ascending.
        max_common_level: the level up to which every request grants the levels themselves.
    """

    def __init__(self, state: SchedulerState, queue: Sequence[QueuedRequest], guard_s: float) -> None:
        """Build the plan from the queue and the arrivals forecast by the state."""
        self.state, self.queue, self.guard_s = state, queue, guard_s
        self.expected, self._expected_deadlines = _expected(state)
        self.deadlines = [request.deadline_at for request in queue]
        self.deadlines += self._expected_deadlines
        self.deadlines.sort()
        waiting, coming = {request.constraints.grant for request in queue}, {each.grant for each in self.expected}
        self._grants = waiting | coming  # few grants: most requests share one
        self.max_common_level = min([grant.highest_level for grant in self._grants], default=0)

    def highest_feasible_level(self, highest: int) -> int | None:
        """Return the highest feasible level up to `highest`, by bisection; None if the cheapest is infeasible."""
        low, high = -1, highest
        while low < high:
            middle = (low + high + 1) // 2
            if self.meets_deadlines(middle):
                low = middle
            else:
                high = middle - 1
        return low if low >= 0 else None

    def meets_deadlines(self, level: int, after_s: float = 0.0) -> bool:
        """Return whether a level leaves no request late if the engine is free only after `after_s` seconds."""
        state = self._cautious if level else self.state  # the safety factor may cost accuracy, but never a request
        if level <= self.max_common_level:
            return meets_deadlines(state, self.deadlines, level, self.batch_limit(level), after_s=after_s)
        index = self.common_target(level)
        if index is not None:
            limit = _batch_limit(state, index, self.guard_s)
            return meets_deadlines(state, self.deadlines, index, limit, planned=MAX_PLANNED, after_s=after_s)
        targets = [by_level[level] for by_level in self._first_grants]
        return meets_deadlines_mixed(state, self.deadlines, targets, self.guard_s, after_s=after_s)

    def common_target(self, level: int) -> int | None:
        """Return the index of the variant that every request gets at a level; None where they differ."""
        indices = {grant.by_level[level] for grant in self._grants}
        return indices.pop() if len(indices) == 1 else None

    def mixed_batch_limit(self, level: int, index: int) -> int:
        """Return the largest batch of a variant that leaves the other variants in the plan's first group their time."""
        state, by_batch_s = self.state, self.state.latencies_s[index]
        room = min(self.deadlines[0] - state.now, max(self.guard_s, by_batch_s[0] * state.slowdown))
        room /= state.slowdown
        if self.common_target(level) is not None:
            return bisect_right(by_batch_s, room)
        targets = [by_level[level] for by_level in self._first_grants[: state.max_batch_size]]
        sizes, cost = take_group(state.latencies_s, targets, room)
        own_s = by_batch_s[sizes[index] - 1] if sizes[index] else 0.0
        return max(sizes[index], bisect_right(by_batch_s, room - cost + own_s))

    def is_too_long(self, index: int, size: int) -> bool:
        """Return whether a batch leaves too little time for a new request, or with its second looks for the head."""
        state = self.state
        batch_s, all_s = state.batch_s(index, size), state.longest_s(index, size)
        return batch_s * MARGIN > self.guard_s or all_s * MARGIN > self.queue[0].deadline_at - state.now

    def batch_limit(self, index: int) -> int:
        """Return the largest batch that a new request with a tight budget can wait for; at least 1."""
        return _batch_limit(self.state, index, self.guard_s)

    @cached_property
    def _cautious(self) -> SchedulerState:
        return self.state.slowed(self.state.safety_factor)

    @cached_property
    def _first_grants(self) -> list[tuple[int, ...]]:
        """The variants by level of each of the MAX_PLANNED requests that are due first."""
        first = [(request.deadline_at, request.constraints.grant.by_level) for request in self.queue[:MAX_PLANNED]]
        coming = zip(self._expected_deadlines, self.expected, strict=True)
        first += [(deadline, constraints.grant.by_level) for deadline, constraints in coming]
        first.sort(key=itemgetter(0))
        return [by_level for _, by_level in first[:MAX_PLANNED]]


def _batch_limit(state: SchedulerState, index: int, guard_s: float) -> int:
    return max(1, state.fitting(index, guard_s, state.max_batch_size))


def _expected(state: SchedulerState) -> tuple[list[RequestConstraints], list[float]]:
    """Return the forecast arrivals, with an allowance for chance, like the last requests, and their deadlines."""
    mean = state.arrival_rate * FORECAST_S
    arrivals = mean + math.sqrt(mean)  # plus one Poisson standard deviation: where few come, twice as many may
    count, now, rate = min(round(arrivals), MAX_EXPECTED), state.now, arrivals / FORECAST_S
    # The last one first: where one arrival is expected, the oldest remembered would stand for it for minutes.
    alike = list(islice(cycle(reversed(state.recent)), count))
    return alike, [now + place / rate + each.budget_s for place, each in enumerate(alike, start=1)]


def guard_time_s(state: SchedulerState) -> float:
    """Return the longest batch after which requests that arrive during it, on tight budgets, can still be answered.

    Infinite where few arrivals are expected (MIN_ARRIVALS_TO_GUARD), or where not even one could be answered.
    """
    rate, most, tight_s = state.arrival_rate, state.max_batch_size, state.tight_budget_s

    def room(count: int) -> float:
        return tight_s - state.latency_s(0, count)

    if room(1) <= 0 or rate * state.latency_s(state.catalog.num_levels - 1, 1) <= MIN_ARRIVALS_TO_GUARD:
        return math.inf
    # The longer the batch, the more requests arrive during it, and the less time they leave for it.
    enough = bisect_left(range(1, most + 1), True, key=lambda count: count / rate >= room(count))
    if enough < most:
        return max(enough / rate, room(enough + 1))
    return max(most / rate, tight_s / (1 + rate * state.latency_s(0, most) / most))  # more than one batch of arrivals
