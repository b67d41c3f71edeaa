"""The choice of a variant and a batch, as a pure function of the queue, the machine's state and the catalog.

The idea: find the highest level at which everything that waits, and what will probably arrive in the next moment, can
still be answered in time when served in order of deadline with the largest batches that fit; run the first batch of
that plan. If even the cheapest level cannot do it, serve there, and shed as few requests as possible, those that would
miss their deadlines anyway and would take others with them.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, cycle, islice
from operator import attrgetter, itemgetter

from service.domain import ReasonCode
from service.scheduling.feasibility import (
    clears,
    clears_mixed,
    exceeds_capacity,
    is_sustained_overload,
    take_group,
)
from service.scheduling.state import BatchDecision, QueuedRequest, Reason, RequestConstraints, SchedulerState, target

FORECAST_S = 0.25
# These bound the time of a decision, to under a millisecond however many wait.
MAX_EXPECTED = 96
MAX_PLANNED = 128  # the most urgent, where each must be looked at; the others' turn comes
MARGIN = 1.05
TIGHT_SHARE = 0.8  # of a tight budget: a batch that takes longer has no place for requests with such a budget
RARE = 0.1  # arrivals during other looks up to which none is reckoned with
BUSY = 0.3  # arrivals per longest single inference from which on the plan leaves room for the next one


def choose_level(state: SchedulerState) -> BatchDecision:
    """Choose the highest level that clears the queue, and its first batch.

    Other looks at images that have an answer already are put off as long as their deadlines allow, so that they form
    large batches. They then come before the level of the others: they may lower it, but make none late.
    """
    expired = _expired(state)
    gone = set(expired)
    queue = [request for request in state.queue if request not in gone] if gone else state.queue
    again = [request for request in queue if request.looks_again_for is not None]
    first = [request for request in queue if request.looks_again_for is None] if again else list(queue)
    careful = replace(state, slowdown=state.slowdown * state.tail_factor)
    is_short = exceeds_capacity(state, state.arrival_rate)
    # With a guard, batches would be too small to carry what comes.
    plan = _Plan(careful, first, math.inf if is_short else _guard_s(careful))
    decision = replace(_choose(state, plan), expired=expired) if first else BatchDecision(None, expired=expired)
    if not again:
        return decision
    if is_sustained_overload(state) or decision.reason.code is ReasonCode.BURST_OVERLOAD:
        return replace(decision, shed=(*again, *decision.shed))
    return _look_again(plan, again, decision)


def _choose(state: SchedulerState, plan: "_Plan") -> BatchDecision:
    is_sustained = is_sustained_overload(state)
    # Time that a better level took now would be missed sooner or later.
    highest = 0 if is_sustained else state.catalog.num_levels - 1
    level = plan.highest_clearing(highest)
    if level is not None:
        decision = _first_batch(plan, level)
        return replace(decision, reason=_reason(ReasonCode.SUSTAINED_OVERLOAD, plan)) if is_sustained else decision
    shed = _to_shed(replace(state, tail_factor=1.0), plan.queue)  # nothing is shed for what is only possible
    dropped = set(shed)
    return _cheapest_batch(plan.state, [request for request in plan.queue if request not in dropped], shed)


def _look_again(plan: "_Plan", again: Sequence[QueuedRequest], instead: BatchDecision) -> BatchDecision:
    """Take the most urgent other looks, if they can wait for no batch more and keep no request from its answer.

    Where they would and nothing else waits, their answers are given as they are: there will be no better moment.
    """
    state, head = plan.state, again[0]
    index = target(head.constraints, 0)
    together = [request for request in again if target(request.constraints, 0) == index]
    size = max(1, min(state.fitting(index, head.deadline_at - state.now, len(together)), plan.batch_limit(index)))
    seconds = state.latency_s(index, size) * MARGIN
    if instead.variant is not None:
        ends_at = state.now + state.batch_s(instead.variant.index, len(instead.batch)) * state.overhead_factor
        if size < state.max_batch_size and ends_at + seconds <= head.deadline_at:
            return instead
    # One that comes meanwhile waits until it has ended.
    is_rare = state.arrival_rate * seconds <= RARE
    if not (is_rare or seconds + state.latency_s(0, 1) <= state.tight_budget_s) or not plan.clears(0, after_s=seconds):
        return instead if instead.variant is not None else replace(instead, shed=tuple(again))
    reason = Reason(ReasonCode.UNSURE, len(again), head.deadline_at - state.now, state.safety_factor)
    return BatchDecision(state.catalog.variants[index], tuple(together[:size]), instead.expired, reason=reason)


class _Plan:
    """Whether a level clears what waits and what is expected; built once per decision, asked once per bisection."""

    def __init__(self, state: SchedulerState, queue: Sequence[QueuedRequest], guard_s: float) -> None:
        self.state = state
        self.cautious = replace(state, slowdown=state.slowdown * state.safety_factor)
        self.queue = queue
        self.guard_s = guard_s
        self.coming = _expected(state)
        granted = [request.constraints for request in queue]
        granted += [constraints for _, constraints in self.coming]
        self.lowest_limit = min([each.grant.highest_level for each in granted], default=0)
        self.deadlines = [request.deadline_at for request in queue]
        self.deadlines += [deadline for deadline, _ in self.coming]
        self.deadlines.sort()

    @cached_property
    def first_constraints(self) -> list[RequestConstraints]:
        """Of the MAX_PLANNED that are due first."""
        first = [(request.deadline_at, request.constraints) for request in self.queue[:MAX_PLANNED]] + self.coming
        first.sort(key=itemgetter(0))
        return [constraints for _, constraints in first[:MAX_PLANNED]]

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
        state = self.cautious if level else self.state  # caution costs accuracy, never a request
        if after_s:
            state = replace(state, now=state.now + after_s)
        if level <= self.lowest_limit:
            return clears(state, self.deadlines, level, self.batch_limit(level))
        targets = [target(constraints, level) for constraints in self.first_constraints]
        return clears_mixed(state, self.deadlines, targets, self.guard_s)

    def share(self, level: int, index: int) -> int:
        """The largest batch of a variant that leaves the other variants in the plan's first group their time."""
        state, by_batch_s = self.state, self.state.latencies_s[index]
        targets = [target(constraints, level) for constraints in self.first_constraints[: state.max_batch_size]]
        room = min(self.deadlines[0] - state.now, max(self.guard_s, by_batch_s[0] * state.slowdown))
        room /= state.slowdown
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
        return max(1, self.state.fitting(index, self.guard_s, self.state.max_batch_size))


def _expired(state: SchedulerState) -> tuple[QueuedRequest, ...]:
    """Find the requests whose deadline not even a batch of one at their cheapest variant would meet."""
    ends = [state.now + by_batch_s[0] * state.slowdown for by_batch_s in state.latencies_s]
    latest = max(ends)
    expired = []
    for request in state.queue:
        if request.deadline_at >= latest:
            break
        if request.deadline_at < ends[target(request.constraints, 0)]:
            expired.append(request)
    return tuple(expired)


def _expected(state: SchedulerState) -> list[tuple[float, RequestConstraints]]:
    """The arrivals of the next moment, with some more for chance, evenly spaced, each as a recent one."""
    mean = state.arrival_rate * FORECAST_S
    arrivals = mean + math.sqrt(mean)  # a Poisson deviation more: where few come, chance brings twice as many
    count, now, rate = min(round(arrivals), MAX_EXPECTED), state.now, arrivals / FORECAST_S
    alike = islice(cycle(state.recent), count)
    return [(now + place / rate + each.budget_s, each) for place, each in enumerate(alike, start=1)]


def _guard_s(state: SchedulerState) -> float:
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


def _first_batch(plan: _Plan, level: int) -> BatchDecision:
    """Take the first batch of the plan, with a little margin: a variant that only just fits is lowered."""
    state, queue, head = plan.state, plan.queue, plan.queue[0]
    room = head.deadline_at - state.now
    index = target(head.constraints, level)
    if plan.lowest_limit >= level:
        together, size = queue, plan.batch_limit(index)
    else:
        together = [request for request in queue[:MAX_PLANNED] if target(request.constraints, level) == index]
        size = min(plan.share(level, index), plan.batch_limit(index))
    size = max(1, min(state.fitting(index, room, len(together)), size))
    while level > 0 and not head.constraints.grant.is_pinned and plan.is_too_long(index, size):
        level -= 1
        index = target(head.constraints, level)
    while size > 1 and plan.is_too_long(index, size):
        size -= 1
    # Not all of them grant it, if it was lowered.
    granting = (request for request in together if target(request.constraints, level) == index)
    if len(queue) > 1:
        code = ReasonCode.ALL_IN_TIME
    elif index == state.catalog.best.index:
        code = ReasonCode.ALONE
    else:
        code = ReasonCode.FORECAST if plan.coming else ReasonCode.DEADLINE
    variant = state.catalog.variants[index]
    return BatchDecision(variant, tuple(islice(granting, size)), reason=_reason(code, plan))


def _reason(code: ReasonCode, plan: _Plan) -> Reason:
    state, queue = plan.state, plan.queue
    return Reason(code, len(queue), queue[0].deadline_at - state.now, state.safety_factor)


def _to_shed(state: SchedulerState, queue: Sequence[QueuedRequest]) -> tuple[QueuedRequest, ...]:
    """Choose requests to shed so that the cheapest level answers the rest: low priority first, then the most urgent.

    Those of them that are due so late that no other gains from it stay.
    """
    order = sorted(queue[:MAX_PLANNED], key=attrgetter("priority"))  # stable: by deadline within each priority
    # A key that asks for no more than its share shall not pay for others' arrivals: none is shed for larger batches.
    are_shared = any(request.priority % 1 for request in order)
    if not are_shared and exceeds_capacity(state, state.arrival_rate):
        count = _too_urgent(state, [request.deadline_at for request in order])
        latest = max(
            request.deadline_at for request in order[count:]
        )  # what is due after them takes no place of theirs
        return tuple(request for request in order[:count] if request.deadline_at <= latest)

    def is_answered(rest: Sequence[QueuedRequest]) -> bool:
        return _clears_cheapest(state, sorted(rest, key=attrgetter("deadline_at")))

    # A passing burst: as few as possible.
    fewest = bisect_left(range(len(order) - 1), True, key=lambda count: is_answered(order[count:]))
    if order[0].priority == order[-1].priority:
        return tuple(order[:fewest])
    shed, kept = sorted(order[:fewest], key=attrgetter("deadline_at")), order[fewest:]
    return tuple(shed[: bisect_left(range(len(shed)), True, key=lambda count: is_answered(shed[count:] + kept))])


def _clears_cheapest(state: SchedulerState, queue: Sequence[QueuedRequest]) -> bool:
    """Whether the cheapest variant of each answers the whole `queue`, which is in order of deadline."""
    deadlines, targets = [request.deadline_at for request in queue], [target(each.constraints, 0) for each in queue]
    if any(targets):
        return clears_mixed(state, deadlines, targets, math.inf)
    return clears(state, deadlines, 0, state.max_batch_size)


def _too_urgent(state: SchedulerState, deadlines: Sequence[float]) -> int:
    """Count the requests that keep this batch from being as large as is useful, where arrivals exceed all capacity.

    Small batches would waste the very capacity that is short.

    Args:
        state: at this moment.
        deadlines: in the order in which requests are shed.
    """
    earliest = list(accumulate(reversed(deadlines), min))[::-1]  # of those left, once so many are shed
    largest = state.fitting(0, TIGHT_SHARE * state.tight_budget_s, len(deadlines))
    if largest < 2:  # budgets that leave no room for two say nothing of what is useful
        largest = min(state.max_batch_size, len(deadlines))
    for size in range(largest, 1, -1):
        count = bisect_left(earliest, state.now + state.latency_s(0, size))
        if count + size <= len(deadlines):
            return count
    return 0


def _cheapest_batch(
    state: SchedulerState, queue: Sequence[QueuedRequest], shed: tuple[QueuedRequest, ...]
) -> BatchDecision:
    index, slack_s = target(queue[0].constraints, 0), queue[0].deadline_at - state.now
    together = [request for request in queue[:MAX_PLANNED] if target(request.constraints, 0) == index]
    size = max(1, state.fitting(index, slack_s, len(together)))
    reason = Reason(ReasonCode.BURST_OVERLOAD, len(queue) + len(shed), slack_s)
    return BatchDecision(state.catalog.variants[index], tuple(together[:size]), shed=shed, reason=reason)
