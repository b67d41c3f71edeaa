"""The choice of a sub-network, as a pure function of what the client asked for and what the profile knows."""

from models.profiles import ProfileTable, SubNetworkProfile
from service.domain import Decision, InferenceRequest
from service.errors import BudgetTooSmallError, InvalidParameterError


def choose(request: InferenceRequest, profiles: ProfileTable) -> Decision:
    """Choose the most accurate sub-network whose cost fits the request's budget, the cheapest on a tie.

    A sub-network asked for by name is taken as it is, as long as it fits the budget too.

    Raises:
        BudgetTooSmallError: nothing fits; names the smallest budget that would do.
        InvalidParameterError: the named sub-network is none of the profile's.
    """
    if request.subnetwork is not None:
        row = profiles.by_subnetwork.get(request.subnetwork)
        if row is None:
            raise InvalidParameterError(
                f"{request.subnetwork} is not one of this model's sub-networks; GET /subnetworks lists them"
            )
        _require_budget(request.budget_gflops, row, f"{row.subnetwork} costs")
        return Decision(row, f"{row.subnetwork} was asked for by name")
    _require_budget(request.budget_gflops, profiles.cheapest, "the cheapest sub-network costs")
    fitting = [row for row in profiles.frontier if fits(row, request.budget_gflops)]
    best = fitting[-1]
    quality = "the most accurate" if profiles.is_measured else "the largest"
    if request.budget_gflops is None:
        return Decision(best, f"no budget was given: {best.subnetwork} is {quality} sub-network")
    if best is profiles.frontier[-1]:
        return Decision(best, f"{request.budget_gflops:.12g} GFLOPs admit {quality} sub-network, {best.subnetwork}")
    dearer = profiles.frontier[len(fitting)]
    return Decision(
        best,
        f"{best.subnetwork} is {quality} within {request.budget_gflops:.12g} GFLOPs; the next better one, "
        f"{dearer.subnetwork}, costs {dearer.gflops}",
    )


def fits(row: SubNetworkProfile, budget_gflops: float | None) -> bool:
    """Tell whether `row` costs no more than the budget, compared in the very number that clients are shown."""
    return budget_gflops is None or row.gflops <= budget_gflops


def _require_budget(budget_gflops: float | None, row: SubNetworkProfile, who: str) -> None:
    if not fits(row, budget_gflops):
        raise BudgetTooSmallError(
            f"a budget of {budget_gflops:.12g} GFLOPs is too small: {who} {row.gflops}",
            smallest_budget_gflops=row.gflops,
        )
