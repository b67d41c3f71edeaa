"""Whether an image is looked at once more, and at which variant. Pure: waits for nothing and changes nothing."""

from dataclasses import dataclass, replace

from service.domain import LookCode
from service.scheduling.feasibility import is_sustained_overload
from service.scheduling.state import QueuedRequest, SchedulerState
from service.scheduling.variants import Variant


@dataclass(frozen=True, slots=True)
class Looked:
    """What came of a look.

    Attributes:
        request: that was looked at.
        confidence: calibrated probability of its answer, 0..1.
        spent_macs: multiply-accumulates of this look and those before it.
    """

    request: QueuedRequest
    confidence: float
    spent_macs: int


def may_look_again(request: QueuedRequest) -> bool:
    """Whether a request has looked again already, or may want to whatever the variant."""
    return request.looks_again_for is not None or request.constraints.min_confidence > 0


def next_look(looked: Looked, variant: Variant, state: SchedulerState) -> QueuedRequest | LookCode:
    """Return what shall wait for another look, or why nothing shall.

    A cascade's second look is the one that was measured with its first. A request that names a confidence gets the
    most accurate that its budget and its deadline allow.

    Args:
        looked: the last look at a request.
        variant: that looked.
        state: at this moment; its queue may be empty.
    """
    constraints, second = looked.request.constraints, variant.second_look
    is_wanted = looked.confidence < constraints.min_confidence
    if not is_wanted and (second is None or not looked.confidence < second.threshold):  # nor where it is NaN
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
    request, only = looked.request, state.catalog.grant_alone(chosen)
    return QueuedRequest(
        request.deadline_at, replace(constraints, grant=only), request.priority, looks_again_for=request.admitted
    )
