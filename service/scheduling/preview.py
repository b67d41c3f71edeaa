"""Predicts the decision for a request by asking the policy as if it were queued already. Changes nothing."""

from dataclasses import replace
from typing import NamedTuple

from service.domain import ReasonCode
from service.errors import OverloadedError
from service.scheduling.state import BatchDecision, Decide, QueuedRequest, SchedulerState, target
from service.scheduling.variants import Variant

MAX_PREVIEWED = 8  # decisions; the rest of a longer queue is assumed to be served at the same pace


class Preview(NamedTuple):
    """The prediction for a request: its variant, its batch size, seconds until that batch starts, and the decision."""

    variant: Variant
    batch_size: int
    starts_in_s: float
    decision: BatchDecision


def preview(request: QueuedRequest, state: SchedulerState, decide: Decide, start_at: float) -> Preview:
    """Simulate decisions on the queue until the request is in a batch.

    Args:
        request: a request in the queue of `state`.
        state: the state at this moment.
        decide: the policy.
        start_at: when the engine is free and the request is ready for it.

    Raises:
        OverloadedError: the request would be shed, or would expire.
    """
    queue, catalog, time = list(state.queue), state.catalog, start_at
    queued = len(queue)
    for _ in range(MAX_PREVIEWED):
        decision = decide(replace(state, now=time, queue=queue))
        if request in decision.batch and decision.variant is not None:
            return Preview(decision.variant, len(decision.batch), time - state.now, decision)
        gone = set(decision.removed)
        if request in gone or not gone:
            break
        queue = [other for other in queue if other not in gone]
        if decision.variant is not None:
            time += state.latency_s(decision.variant.index, len(decision.batch)) * state.overhead_factor
    else:
        if decision.reason.code is ReasonCode.UNSURE:  # a batch of other requests, which says nothing of this one
            first = [other for other in queue if other.second_look_of is None]
            decision = decide(replace(state, now=time, queue=first))
        time += (time - start_at) / (queued - len(queue)) * queue.index(request)
        level = 0 if decision.variant is None else min(decision.variant.index, catalog.num_levels - 1)
        variant = catalog.variants[target(request.constraints, level)]
        if time + state.latency_s(variant.index, 1) <= request.deadline_at:
            return Preview(variant, max(1, len(decision.batch)), time - state.now, decision)
    raise OverloadedError("it would be shed to answer other requests in time", "shed", 0.0)
