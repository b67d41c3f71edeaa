"""The choice of a variant and a batch, as a pure function of the queue, the machine's state and the catalog.

The idea: find the highest level at which the whole queue, and the arrivals forecast for the next moment, can still be
answered in time when served in order of deadline with the largest batches that fit; run the first batch of that plan.
If even the cheapest level cannot do it, serve at that level and shed the requests that would miss their deadlines
anyway and make others late: as few as possible, or, where arrivals exceed the capacity, as many as keep batches large.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, islice, takewhile
from operator import attrgetter, itemgetter

from service.domain import ReasonCode
from service.scheduling.feasibility import (
    exceeds_capacity,
    is_sustained_overload,
    meets_deadlines,
    meets_deadlines_mixed,
)
from service.scheduling.plan import MARGIN, MAX_PLANNED, Plan, guard_time_s
from service.scheduling.state import BatchDecision, QueuedRequest, Reason, SchedulerState, target

TIGHT_SHARE = 0.8  # of a tight latency budget: a batch that takes longer leaves no time for requests with such a budget
MAX_ARRIVALS_DURING_LOOK = 0.1  # expected arrivals during a batch of second looks up to which none is planned for


def choose_level(state: SchedulerState) -> BatchDecision:
    """Choose the highest level that meets every deadline, and its first batch.

    Further looks at images that have an answer already are deferred as long as their deadlines allow, so that they form
    large batches. They may lower the level of the other requests, but make none of them late.
    """
    expired = _expired(state)
    gone = set(expired)
    queue = [request for request in state.queue if request not in gone] if gone else state.queue
    again = [request for request in queue if request.second_look_of is not None]
    first = [request for request in queue if request.second_look_of is None] if again else list(queue)
    careful = state.slowed(state.tail_factor)
    is_short = exceeds_capacity(state, state.arrival_rate)
    # With a guard, batches would be too small to keep up with the arrivals.
    plan = Plan(careful, first, math.inf if is_short else guard_time_s(careful))
    decision = _choose(state, plan) if first else BatchDecision(None)
    if expired:
        decision = replace(decision, expired=expired)
    if not again:
        return decision
    if is_sustained_overload(state) or decision.reason.code is ReasonCode.BURST_OVERLOAD:
        return replace(decision, shed=(*again, *decision.shed))
    return _look_again(plan, again, decision)


def _choose(state: SchedulerState, plan: Plan) -> BatchDecision:
    is_sustained = is_sustained_overload(state)
    # Under sustained overload, time spent on a better level now would be missing later.
    highest = 0 if is_sustained else state.catalog.num_levels - 1
    level = plan.highest_feasible_level(highest)
    if level is not None:
        decision = _first_batch(plan, level)
        return replace(decision, reason=_reason(ReasonCode.SUSTAINED_OVERLOAD, plan)) if is_sustained else decision
    shed = _to_shed(replace(state, tail_factor=1.0), plan.queue)  # nothing is shed for a delay that is only possible
    dropped = set(shed)
    return _cheapest_batch(plan.state, [request for request in plan.queue if request not in dropped], shed)


def _look_again(plan: Plan, again: Sequence[QueuedRequest], instead: BatchDecision) -> BatchDecision:
    """Run the most urgent further looks if they cannot wait for another batch and make no other request late.

    If they would make one late and nothing else is to run, the answers that they have are given as they are: there
    will be no better moment.
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
    # A request that arrives during the batch waits until it has ended.
    is_rare = state.arrival_rate * seconds <= MAX_ARRIVALS_DURING_LOOK
    if not (is_rare or seconds + state.latency_s(0, 1) <= state.tight_budget_s) or not plan.meets_deadlines(
        0, after_s=seconds
    ):
        return instead if instead.variant is not None else replace(instead, shed=tuple(again))
    reason = Reason(ReasonCode.UNSURE, len(again), head.deadline_at - state.now, state.safety_factor)
    return BatchDecision(state.catalog.variants[index], tuple(together[:size]), instead.expired, reason=reason)


def _expired(state: SchedulerState) -> tuple[QueuedRequest, ...]:
    """Return the requests whose deadlines not even a batch of one at their cheapest variant would meet."""
    now, slowdown, latencies_s = state.now, state.slowdown, state.latencies_s
    latest = now + max(map(itemgetter(0), latencies_s)) * slowdown
    urgent = takewhile(lambda request: request.deadline_at < latest, state.queue)
    return tuple(
        request
        for request in urgent
        if request.deadline_at < now + latencies_s[target(request.constraints, 0)][0] * slowdown
    )


def _first_batch(plan: Plan, level: int) -> BatchDecision:
    """Return the first batch of the plan, with a small margin: a variant that only just fits is lowered."""
    state, queue, head = plan.state, plan.queue, plan.queue[0]
    room = head.deadline_at - state.now
    index = target(head.constraints, level)
    if plan.max_common_level >= level:
        together, size = queue, plan.batch_limit(index)
    else:
        together = queue[:MAX_PLANNED]
        if plan.common_target(level) is None:
            together = [request for request in together if target(request.constraints, level) == index]
        size = min(plan.mixed_batch_limit(level, index), plan.batch_limit(index))
    size = max(1, min(state.fitting(index, room, len(together)), size))
    while level > 0 and not head.constraints.grant.is_pinned and plan.is_too_long(index, size):
        level -= 1
        index = target(head.constraints, level)
    while size > 1 and plan.is_too_long(index, size):
        size -= 1
    # If the level was lowered, not all of these requests have the variant as their target.
    granting = (request for request in together if target(request.constraints, level) == index)
    if len(queue) > 1:
        code = ReasonCode.ALL_IN_TIME
    elif index == state.catalog.best.index:
        code = ReasonCode.ALONE
    else:
        code = ReasonCode.FORECAST if plan.expected else ReasonCode.DEADLINE
    variant = state.catalog.variants[index]
    return BatchDecision(variant, tuple(islice(granting, size)), reason=_reason(code, plan))


def _reason(code: ReasonCode, plan: Plan) -> Reason:
    state, queue = plan.state, plan.queue
    return Reason(code, len(queue), queue[0].deadline_at - state.now, state.safety_factor)


def _to_shed(state: SchedulerState, queue: Sequence[QueuedRequest]) -> tuple[QueuedRequest, ...]:
    """Choose requests to shed so that the cheapest level answers the rest: low priority first, then the most urgent.

    Requests that are due so late that shedding them helps no other are kept.
    """
    order = sorted(queue[:MAX_PLANNED], key=attrgetter("priority"))  # stable: by deadline within each priority
    # With fair shares, none is shed for larger batches: a key within its share must not pay for others' arrivals.
    are_shared = any(request.priority % 1 for request in order)
    if not are_shared and exceeds_capacity(state, state.arrival_rate):
        count = _too_urgent(state, [request.deadline_at for request in order])
        # Requests due after all that are kept take no time from them.
        latest = max(request.deadline_at for request in order[count:])
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
    """Return whether the cheapest variant of each request answers all of `queue`, which is in order of deadline."""
    deadlines, targets = [request.deadline_at for request in queue], [target(each.constraints, 0) for each in queue]
    if any(targets):
        return meets_deadlines_mixed(state, deadlines, targets, math.inf)
    return meets_deadlines(state, deadlines, 0, state.max_batch_size)


def _too_urgent(state: SchedulerState, deadlines: Sequence[float]) -> int:
    """Count the requests that keep this batch from being as large as is useful, where arrivals exceed the capacity.

    Small batches would waste the very capacity that is short.

    Args:
        state: the state at this moment.
        deadlines: the deadlines, in the order in which requests are shed.
    """
    earliest = list(accumulate(reversed(deadlines), min))[::-1]  # earliest deadline of the rest, by how many are shed
    largest = state.fitting(0, TIGHT_SHARE * state.tight_budget_s, len(deadlines))
    if largest < 2:  # budgets too short for two requests say nothing about a useful size
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
    alike = (request for request in queue[:MAX_PLANNED] if target(request.constraints, 0) == index)
    together = tuple(islice(alike, state.max_batch_size))
    size = max(1, state.fitting(index, slack_s, len(together)))
    reason = Reason(ReasonCode.BURST_OVERLOAD, len(queue) + len(shed), slack_s)
    return BatchDecision(state.catalog.variants[index], together[:size], shed=shed, reason=reason)
