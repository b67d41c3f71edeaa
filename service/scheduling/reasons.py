"""Explains a decision in a sentence for a person. Decides nothing."""

import math
from collections.abc import Sequence
from itertools import pairwise

from service.domain import Look, LookCode, ReasonCode
from service.scheduling.catalog import VariantCatalog
from service.scheduling.state import BatchDecision, Reason, RequestConstraints
from service.scheduling.variants import Variant

WHY_NOT_AGAIN = {
    LookCode.NONE_BETTER: "no sub-network is more accurate",
    LookCode.BUDGET: "another look would exceed the GFLOPs limit",
    LookCode.DEADLINE: "there was no time for another look",
    LookCode.OVERLOAD: "waiting or expected requests needed the time for another look",
    LookCode.FAILED: "the model failed during another look",
}
NOTEWORTHY = 1.05  # safety factor above which the explanation mentions it


def reason_of(constraints: RequestConstraints, variant: Variant, decision: BatchDecision) -> Reason:
    """Return why a request got its variant: its own constraints where they decided, the queue otherwise.

    Args:
        constraints: the constraints of the request.
        variant: the variant that it got.
        decision: the decision that its batch came from.
    """
    grant = constraints.grant
    if grant.is_pinned:
        return Reason(ReasonCode.PINNED)
    if math.isinf(constraints.max_gflops) or variant.index != grant.best.index:
        return decision.reason
    if constraints.is_rated and grant.highest_level == len(grant.by_level) - 1:  # the rate bounds further looks alone
        return decision.reason
    return Reason(ReasonCode.KEY_RATE if constraints.is_rated else ReasonCode.GFLOPS_BUDGET)


def explain(reason: Reason, catalog: VariantCatalog, variant: Variant, max_gflops: float = math.inf) -> str:
    """Put a reason into words.

    Args:
        reason: the reason of the decision.
        catalog: the variants that could be chosen.
        variant: the variant that was chosen.
        max_gflops: most that the request may cost, for the case that this is the reason.
    """
    chosen, quality = str(variant), "the most accurate" if catalog.is_measured else "the largest"
    match reason.code:
        case ReasonCode.PINNED:
            return f"{chosen} was requested by name"
        case ReasonCode.GFLOPS_BUDGET:
            return _explain_budget(catalog, variant, f"{max_gflops:.12g} GFLOPs", quality)
        case ReasonCode.KEY_RATE:
            left = f"the {max_gflops:.4g} GFLOPs left in the rate of its key"
            return _explain_budget(catalog, variant, left, quality)
        case ReasonCode.BASELINE:
            return f"{reason.policy}: {chosen}, {1000 * reason.slack_s:.0f} ms left for the most urgent request"
        case ReasonCode.SUSTAINED_OVERLOAD:
            lowest = catalog.lowest
            return f"{reason.queued} waiting, and arrivals have for seconds exceeded what even {lowest} can sustain"
        case ReasonCode.BURST_OVERLOAD:
            return f"{reason.queued} waiting and more expected than can be answered in time: {chosen} answers the most"
        case ReasonCode.NOTHING_TO_RUN:
            return "no waiting request can be answered in time"
        case ReasonCode.UNSURE:
            return f"{reason.queued} waiting with unsure answers: {chosen} looks again"
        case ReasonCode.ALONE:
            return f"no other request is waiting: {chosen} is {quality} {_kind(variant)}"
        case _:
            return _explain_deadlines(reason, catalog, variant, quality)


def _explain_deadlines(reason: Reason, catalog: VariantCatalog, variant: Variant, quality: str) -> str:
    chosen = str(variant)
    if variant == catalog.best:
        return f"{reason.queued} waiting: {chosen}, {quality} {_kind(variant)}, answers all of them in time"
    cautiously = ""
    if reason.safety_factor > NOTEWORTHY:
        cautiously = f" if better ones take {reason.safety_factor:.1f} times as long (requests were missed recently)"
    left = f"{1000 * reason.slack_s:.0f} ms left"
    if reason.code is ReasonCode.DEADLINE:
        return f"{left}: {chosen} is {quality} that answers in time{cautiously}"
    before = f"{left} and more requests expected" if reason.code is ReasonCode.FORECAST else f"{reason.queued} waiting"
    return f"{before}: {chosen} is {quality} that answers all of them in time{cautiously}"


def _explain_budget(catalog: VariantCatalog, variant: Variant, budget: str, quality: str) -> str:
    costlier = catalog.next_better(variant)
    if costlier is None:
        return f"{budget} allow {quality} {_kind(variant)}, {variant}"
    costs = f"{_rounded_up(costlier.most_gflops):.4g}"
    return f"{variant} is {quality} within {budget}; the next better one, {costlier}, costs {costs}"


def _rounded_up(gflops: float) -> float:
    """Round up to four digits: a budget of the number shown must be enough."""
    unit: float = 10.0 ** (math.floor(math.log10(gflops)) - 3)
    return math.ceil(gflops / unit) * unit


def _kind(variant: Variant) -> str:
    return "sub-network" if variant.second_look is None else "cascade"


def explain_looks(looks: Sequence[Look], stopped: LookCode) -> str:
    """Explain in half a sentence what followed an answer that was less sure than wanted; empty for any other.

    Args:
        looks: the looks at the image, in order.
        stopped: why no further look followed.
    """
    again = [
        f"; {_percent(before.confidence)} sure, so {look.profile.subnetwork} looked again"
        for before, look in pairwise(looks)
    ]
    if stopped is LookCode.SURE:
        return "".join(again)
    return "".join(again) + f"; only {_percent(looks[-1].confidence)} sure, but {WHY_NOT_AGAIN[stopped]}"


def _percent(confidence: float) -> str:
    # Round down: what is under a threshold must not read as if it reached it. The 1e-5 is for a float32, which is off
    # by up to 6e-8.
    return f"{math.floor(100 * confidence + 1e-5)} %"
