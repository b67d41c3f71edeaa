"""Why a decision was made, in a sentence for a person. Decides nothing."""

from service.domain import ReasonCode
from service.scheduling.catalog import Variant, VariantCatalog
from service.scheduling.state import BatchDecision, Reason, RequestConstraints

NOTEWORTHY = 1.05  # safety factor that a person should hear of


def reason_of(
    constraints: RequestConstraints, budget_gflops: float | None, variant: Variant, decision: BatchDecision
) -> Reason:
    """Tell why a request got its variant: its own constraints where they decided, the queue otherwise.

    Args:
        constraints: what the request grants.
        budget_gflops: what it named.
        variant: what it got.
        decision: what it ran with.
    """
    if constraints.pinned is not None:
        return Reason(ReasonCode.PINNED)
    limit = constraints.highest_level if constraints.over_limit is None else constraints.over_limit.index
    return decision.reason if budget_gflops is None or variant.index != limit else Reason(ReasonCode.GFLOPS_BUDGET)


def explain(reason: Reason, catalog: VariantCatalog, variant: Variant, budget_gflops: float | None = None) -> str:
    """Put a reason into words.

    Args:
        reason: why.
        catalog: what could be chosen.
        variant: what was chosen.
        budget_gflops: what the request named, for the reason that it is.
    """
    chosen, quality = variant.profile.subnetwork, "the most accurate" if catalog.is_measured else "the largest"
    match reason.code:
        case ReasonCode.PINNED:
            return f"{chosen} was asked for by name"
        case ReasonCode.GFLOPS_BUDGET if budget_gflops is not None:
            return _explain_budget(catalog, variant, budget_gflops, quality)
        case ReasonCode.BASELINE:
            return f"{reason.policy}: {chosen}, {1000 * reason.slack_s:.0f} ms left to the most urgent"
        case ReasonCode.SUSTAINED_OVERLOAD:
            cheapest = catalog.cheapest.profile.subnetwork
            return f"{reason.queued} waiting and, for seconds now, more coming than even {cheapest} carries for long"
        case ReasonCode.BURST_OVERLOAD:
            return f"{reason.queued} waiting and more expected than can be answered in time: {chosen} answers the most"
        case ReasonCode.NOTHING_TO_RUN:
            return "nothing that waits can be answered in time"
        case ReasonCode.ALONE:
            return f"nothing else waits: {chosen} is {quality} sub-network"
        case _:
            return _explain_deadlines(reason, catalog, variant, quality)


def _explain_deadlines(reason: Reason, catalog: VariantCatalog, variant: Variant, quality: str) -> str:
    chosen = variant.profile.subnetwork
    if variant is catalog.best:
        return f"{reason.queued} waiting: {chosen}, {quality} sub-network, answers all of them in time"
    cautiously = ""
    if reason.safety_factor > NOTEWORTHY:
        cautiously = f" if better ones take {reason.safety_factor:.1f} times as long (requests were missed of late)"
    left = f"{1000 * reason.slack_s:.0f} ms left"
    if reason.code is ReasonCode.DEADLINE:
        return f"{left}: {chosen} is {quality} that answers in time{cautiously}"
    before = f"{left} and others expected" if reason.code is ReasonCode.FORECAST else f"{reason.queued} waiting"
    return f"{before}: {chosen} is {quality} that answers all of them in time{cautiously}"


def _explain_budget(catalog: VariantCatalog, variant: Variant, budget_gflops: float, quality: str) -> str:
    chosen, dearer = variant.profile.subnetwork, catalog.next_better(variant)
    if dearer is None:
        return f"{budget_gflops:.12g} GFLOPs admit {quality} sub-network, {chosen}"
    return (
        f"{chosen} is {quality} within {budget_gflops:.12g} GFLOPs; the next better one, {dearer.profile.subnetwork}, "
        f"costs {dearer.profile.gflops}"
    )
