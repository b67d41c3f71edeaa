"""Whether what waits, and what will probably come in the next moment, is answered in time at a level. Chooses none."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import cycle, islice
from operator import itemgetter

from service.scheduling.feasibility import clears, clears_mixed, take_group
from service.scheduling.state import QueuedRequest, RequestConstraints, SchedulerState

FORECAST_S = 0.25
# These bound the time of a decision, however many wait.
MAX_EXPECTED = 96
MAX_PLANNED = 128  # the most urgent, where each must be looked at; the others' turn comes
MARGIN = 1.05
BUSY = 0.3  # arrivals per longest single inference from which on the plan leaves room for the next one


class Plan:
    """What waits and what is expected; built once per decision, asked once per bisection.

    Attributes:
        state: at this moment, with the slowdown to plan with.
        queue: what waits, earliest deadline first.
        guard_s: the longest batch after which what comes meanwhile can still be answered.
        expected: what will probably come, each as a recent request.
        deadlines: of all of it, ascending.
        lowest_limit: the level up to which each of them grants the levels themselves.
    """

    def __init__(self, state: SchedulerState, queue: Sequence[QueuedRequest], guard_s: float) -> None:
        """Take what waits, and expect what the state lets expect."""
        self.state, self.queue, self.guard_s = state, queue, guard_s
        self.expected, self._expected_deadlines = _expected(state)
        self.deadlines = [request.deadline_at for request in queue]
        self.deadlines += self._expected_deadlines
        self.deadlines.sort()
        waiting, coming = {request.constraints.grant for request in queue}, {each.grant for each in self.expected}
        self._grants = waiting | coming  # few: most requests share one
        self.lowest_limit = min([grant.highest_level for grant in self._grants], default=0)

    def highest_clearing(self, highest: int) -> int | None:
        """Bisect the levels up to the highest; None if even the cheapest leaves a request late."""
        low, high = -1, highest
        while low < high:
            middle = (low + high + 1) // 2
            if self.clears(middle):
                low = middle
            else:
                high = middle - 1
        return low if low >= 0 else None

    def clears(self, level: int, after_s: float = 0.0) -> bool:
        """Whether a level leaves no request late, if the engine is free only after some seconds."""
        state = self._cautious if level else self.state  # caution costs accuracy, never a request
        if level <= self.lowest_limit:
            return clears(state, self.deadlines, level, self.batch_limit(level), after_s=after_s)
        index = self.common_target(level)
        if index is not None:
            limit = _batch_limit(state, index, self.guard_s)
            return clears(state, self.deadlines, index, limit, planned=MAX_PLANNED, after_s=after_s)
        targets = [by_level[level] for by_level in self._first_grants]
        return clears_mixed(state, self.deadlines, targets, self.guard_s, after_s=after_s)

    def common_target(self, level: int) -> int | None:
        """Return the variant that every request gets at a level; None where that differs."""
        indices = {grant.by_level[level] for grant in self._grants}
        return indices.pop() if len(indices) == 1 else None

    def share(self, level: int, index: int) -> int:
        """The largest batch of a variant that leaves the other variants in the plan's first group their time."""
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
        """Whether a batch, and the second looks that it will want, leave the head or a new request too little time."""
        state = self.state
        batch_s, all_s = state.batch_s(index, size), state.longest_s(index, size)
        return batch_s * MARGIN > self.guard_s or all_s * MARGIN > self.queue[0].deadline_at - state.now

    def batch_limit(self, index: int) -> int:
        """The largest batch that a new request with a tight budget can wait for; at least one."""
        return _batch_limit(self.state, index, self.guard_s)

    @cached_property
    def _cautious(self) -> SchedulerState:
        return self.state.slowed(self.state.safety_factor)

    @cached_property
    def _first_grants(self) -> list[tuple[int, ...]]:
        """What each of the MAX_PLANNED that are due first gets, by level."""
        first = [(request.deadline_at, request.constraints.grant.by_level) for request in self.queue[:MAX_PLANNED]]
        coming = zip(self._expected_deadlines, self.expected, strict=True)
        first += [(deadline, constraints.grant.by_level) for deadline, constraints in coming]
        first.sort(key=itemgetter(0))
        return [by_level for _, by_level in first[:MAX_PLANNED]]


def _batch_limit(state: SchedulerState, index: int, guard_s: float) -> int:
    return max(1, state.fitting(index, guard_s, state.max_batch_size))


def _expected(state: SchedulerState) -> tuple[list[RequestConstraints], list[float]]:
    """Return the arrivals of the next moment, with some more for chance, each as a recent one, and their deadlines."""
    mean = state.arrival_rate * FORECAST_S
    arrivals = mean + math.sqrt(mean)  # a Poisson deviation more: where few come, chance brings twice as many
    count, now, rate = min(round(arrivals), MAX_EXPECTED), state.now, arrivals / FORECAST_S
    alike = list(islice(cycle(state.recent), count))
    return alike, [now + place / rate + each.budget_s for place, each in enumerate(alike, start=1)]


def guard_time_s(state: SchedulerState) -> float:
    """The longest batch after which requests that come meanwhile can still be answered, however tight their budgets.

    Infinite where none is due, or where not even one of them could be.
    """
    rate, most, tight_s = state.arrival_rate, state.max_batch_size, state.tight_budget_s

    def room(count: int) -> float:
        return tight_s - state.latency_s(0, count)

    if room(1) <= 0 or rate * state.latency_s(state.catalog.num_levels - 1, 1) <= BUSY:
        return math.inf
    # The longer the batch, the more of them come, and the less room they leave it.
    enough = bisect_left(range(1, most + 1), True, key=lambda count: count / rate >= room(count))
    if enough < most:
        return max(enough / rate, room(enough + 1))
    return max(most / rate, tight_s / (1 + rate * state.latency_s(0, most) / most))  # more than a batch of them
