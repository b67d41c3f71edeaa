"""What a request may cost, how long it may take and its priority, from its own wishes and the limits of its key."""

import math
from dataclasses import replace

from service.domain import InferenceRequest
from service.errors import BudgetTooSmallError, InvalidParameterError, OverloadedError
from service.scheduling.catalog import VariantCatalog
from service.scheduling.key_ledger import KeyLedger
from service.scheduling.state import RequestConstraints


def allow(
    request: InferenceRequest, catalog: VariantCatalog, ledger: KeyLedger, now: float, granted_s: float
) -> RequestConstraints:
    """Compute what a request may cost now.

    What its key has left is divided equally among its `num_together` runs.

    Args:
        request: the request.
        catalog: the variants that can run.
        ledger: what the keys have left.
        now: the current instant.
        granted_s: seconds from its arrival until its batch must have ended.

    Raises:
        BudgetTooSmallError: no sub-network, or not the one that it names, fits its budget or ever fits its key.
        InvalidParameterError: the model does not have the sub-network that it names.
        OverloadedError: the rate of its key is used up; says when the cheapest will fit again.
    """
    if request.subnetwork is None:
        grant = catalog.grant_within(request.budget_gflops)
    else:
        grant = catalog.grant_named(request.subnetwork, request.budget_gflops)
    max_gflops = math.inf if request.budget_gflops is None else request.budget_gflops
    constraints = RequestConstraints(granted_s, grant, max_gflops, request.min_confidence)
    if request.key is None:
        return constraints
    left = ledger.left_gflops(request.key, now) / request.num_together
    if grant.best.most_gflops <= left:
        # Where the client wants to be sure, the rate bounds the further looks.
        is_bounded = request.min_confidence > 0 and left < max_gflops
        return replace(constraints, max_gflops=left, is_rated=True) if is_bounded else constraints
    least = grant.best.most_gflops if grant.is_pinned else catalog.least_gflops
    if least <= left:
        return replace(constraints, grant=catalog.grant_within(left), max_gflops=left, is_rated=True)
    needed = request.num_together * least
    wait_s = ledger.wait_s(request.key, needed, now)
    if math.isinf(wait_s):
        raise BudgetTooSmallError(f"the request costs {needed:.6g} GFLOPs, more than this key may ever spend at once")
    message = "this key has used up its rate, even for the cheapest suitable sub-network; try again later"
    raise OverloadedError(message, "key", wait_s)


def most_gflops_of(constraints: RequestConstraints, catalog: VariantCatalog) -> float:
    """Return the most that a request can cost: its best variant and, if it wants to be sure, a further look."""
    best_gflops = constraints.grant.best.most_gflops
    if not constraints.min_confidence:
        return best_gflops
    return min(constraints.max_gflops, best_gflops + catalog.best_single.most_gflops)


def allow_time_ms(request: InferenceRequest, default_budget_ms: float) -> float:
    """Return the latency budget of a request, in milliseconds.

    Raises:
        BudgetTooSmallError: its budget is shorter than its key allows.
    """
    shortest_ms = 0.0 if request.key is None else request.key.shortest_budget_ms or 0.0
    if request.budget_ms is None:
        return max(default_budget_ms, shortest_ms)
    if request.budget_ms < shortest_ms:
        message = (
            f"a budget of {request.budget_ms:.6g} ms is too small: this key requires at least {shortest_ms:.6g} ms"
        )
        raise BudgetTooSmallError(message, smallest_budget_ms=shortest_ms)
    return request.budget_ms


def allow_priority(request: InferenceRequest) -> int:
    """Return the priority of a request.

    Raises:
        InvalidParameterError: the priority is higher than its key allows, or than 0 without a key.
    """
    highest = 0 if request.key is None else request.key.highest_priority
    if request.priority is None:
        return min(0, highest)
    if request.priority > highest:
        raise InvalidParameterError(f"priority: must be at most {highest}", parameter="priority")
    return request.priority
