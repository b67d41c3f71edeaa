"""Decides whether an image is looked at again, and by which variant. Pure: waits for nothing and changes nothing."""

from dataclasses import dataclass, replace

from service.domain import LookCode
from service.scheduling.feasibility import is_sustained_overload
from service.scheduling.state import QueuedRequest, SchedulerState
from service.scheduling.variants import Variant


@dataclass(frozen=True, slots=True)
class Looked:
    """The result of a look.

    Attributes:
        request: the request whose image was looked at.
        confidence: calibrated probability of the answer, 0..1.
        spent_macs: multiply-accumulates of this look and of those before it.
    """

    request: QueuedRequest
    confidence: float
    spent_macs: int


def may_look_again(request: QueuedRequest) -> bool:
    """Return whether a request is a further look already, or may want one whichever variant ran."""
    return request.second_look_of is not None or request.constraints.min_confidence > 0


def next_look(looked: Looked, variant: Variant, state: SchedulerState) -> QueuedRequest | LookCode:
    """Return the request to enqueue for another look, or why there is none.

    A cascade's second look is the one that was measured with its first. A request that is less sure than its own
    `min_confidence` gets the most accurate variant that its budget and its deadline allow.

    Args:
        looked: the result of the last look.
        variant: the variant that looked.
        state: the state at this moment; its queue may be empty.
    """
    constraints, second = looked.request.constraints, variant.second_look
    is_wanted = looked.confidence < constraints.min_confidence
    if not is_wanted and (second is None or not looked.confidence < second.threshold):  # NaN counts as sure
        return LookCode.SURE
    if is_sustained_overload(state):
        return LookCode.OVERLOAD
    if is_wanted or second is None:
        alone = (one for one in reversed(state.catalog.frontier) if one.second_look is None)
        better = [one for one in alone if one.worth > state.catalog.variants[variant.first_index].worth]
    else:
        better = [state.catalog.variants[second.index]]
    if not better:
        return LookCode.NONE_BETTER
    within = [one for one in better if (looked.spent_macs + one.profile.macs) / 1e9 <= constraints.max_gflops]
    if not within:
        return LookCode.BUDGET
    room_s = (looked.request.deadline_at - state.now) / state.tail_factor
    chosen = next((one for one in within if state.latency_s(one.index, 1) <= room_s), None)
    if chosen is None:
        return LookCode.DEADLINE
    request, only = looked.request, state.catalog.grant_single(chosen)
    return QueuedRequest(
        request.deadline_at, replace(constraints, grant=only), request.priority, second_look_of=request.admitted
    )
