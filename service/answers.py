"""Builds the answer to a request from the results of the looks at its image."""

import logging
import math

from service.domain import Classification, Decision, Look, LookCode, Prediction, Timing
from service.errors import ModelError
from service.execution.results import Result
from service.scheduling.catalog import VariantCatalog
from service.scheduling.reasons import explain, explain_looks, reason_of
from service.scheduling.state import RequestConstraints

logger = logging.getLogger(__name__)

# Stop reasons after which an image has had every look that its variant provides for it.
COMPLETE = (LookCode.SURE, LookCode.NONE_BETTER)


def classification_of(
    result: Result,
    constraints: RequestConstraints,
    catalog: VariantCatalog,
    predictions: tuple[Prediction, ...],
    timing: Timing,
    budget_s: float,
) -> Classification:
    """Build the answer that the client receives.

    Args:
        result: the result of the last look, linked to those before it.
        constraints: the limits of the request.
        catalog: the variants that could be chosen.
        predictions: the result of `predictions_of`.
        timing: the time spent in each stage.
        budget_s: the latency budget of the request.
    """
    first = result.looks[0]
    looks = tuple(
        Look(look.variant.profile, int(look.ranking[0]), look.confidence, look.inference_s, look.started_at)
        for look in result.looks
    )
    reason = reason_of(constraints, first.variant, first.decision)
    sentence = explain(reason, catalog, first.variant, constraints.max_gflops) + explain_looks(looks, result.stopped)
    expected_top1, best = _expected_top1(result), catalog.best.top1
    return Classification(
        predictions,
        result.probabilities,
        looks,
        result.stopped,
        Decision(looks[-1].profile, result.batch_size, result.predicted_s, reason.code, sentence),
        timing,
        budget_s=budget_s,
        expected_top1=expected_top1,
        # A sub-network between the trained ones, requested by name, may have measured better than the best variant.
        accuracy_loss=None if best is None or expected_top1 is None else max(0.0, best - expected_top1),
        saved_gflops=max(0.0, catalog.best_single.gflops - result.spent_macs / 1e9),
    )


def predictions_of(result: Result, class_names: tuple[str, ...], top_k: int) -> tuple[Prediction, ...]:
    """Return the `top_k` most probable classes, the best first.

    Raises:
        ModelError: the probabilities are NaN.
    """
    best = result.ranking[:top_k]
    probabilities = result.probabilities[best].tolist()
    if not math.isfinite(probabilities[0]):  # one NaN logit makes the sum NaN, and so every probability
        logger.error("the model returned non-finite outputs for an image: %s", result.logits.tolist()[:top_k])
        raise ModelError("the model's output for this image is not finite")
    return tuple(
        Prediction(index, class_names[index], probability)
        for index, probability in zip(best.tolist(), probabilities, strict=True)
    )


def _expected_top1(result: Result) -> float | None:
    """Return the expected accuracy of the chosen variant.

    It is lower where a cascade was cut short, and that of the most accurate look where that exceeds the variant's.
    """
    first = result.looks[0].variant
    if len(result.looks) == 1:
        return first.top1 if result.stopped in COMPLETE else first.top1_without_second_look
    measured = [look.variant.profile.top1 for look in result.looks if look.variant.profile.top1 is not None]
    return max((top1 for top1 in (first.top1, *measured) if top1 is not None), default=None)
