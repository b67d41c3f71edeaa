"""Calibration of probabilities: its error, and the temperature scaling that reduces it (Guo et al., ICML 2017)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.profiles import LOWEST_ENTROPY

NUM_BINS = 15
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0
LOWEST_EXPONENT, HIGHEST_EXPONENT = 1e-3, 1.0
ITERATIONS = 50


@dataclass(frozen=True, slots=True)
class Scaling:
    """Calibration of logits: probabilities are softmax(logits / T), where T = temperature * H ** entropy_exponent.

    H is the entropy of softmax(logits) divided by its maximum, log(classes), and at least LOWEST_ENTROPY. A temperature
    alone cannot calibrate a network that is underconfident where it is sure and overconfident where it is not (Balanya
    et al., "Adaptive temperature scaling for robust calibration of deep neural networks", 2024). The order of classes
    does not change.
    """

    temperature: float = 1.0
    entropy_exponent: float = 0.0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Map (B, classes) logits to probabilities."""
        return _log_probabilities(logits, self.temperature, self.entropy_exponent).exp()


def fit_scaling(logits: Tensor, labels: Tensor) -> Scaling:
    """Fit the scaling that maximises the likelihood of which answers are right, given their probabilities.

    One more image, whose label is any class with equal probability, prevents answers that are all right on a few images
    from becoming certain.

    Args:
        logits: (M, classes).
        labels: (M,) class indices.

    Returns:
        A temperature from LOWEST_TEMPERATURE to HIGHEST_TEMPERATURE, an exponent from LOWEST_EXPONENT to
        HIGHEST_EXPONENT.
    """
    logits = logits.to(torch.float64, copy=True)  # a copy, as autograd refuses inference tensors
    any_class = 1 / (1 + len(labels))
    right = (1 - any_class) * (logits.argmax(dim=1) == labels) + any_class / logits.shape[1]
    lowest = torch.tensor([LOWEST_TEMPERATURE, LOWEST_EXPONENT], dtype=torch.float64)
    highest = torch.tensor([HIGHEST_TEMPERATURE, HIGHEST_EXPONENT], dtype=torch.float64)
    place = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # between the bounds: 0 is half-way, in logarithms
    optimizer = torch.optim.LBFGS([place], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def bounded() -> Tensor:
        return lowest * (highest / lowest) ** place.sigmoid()

    def loss() -> Tensor:
        optimizer.zero_grad()
        confidence = _log_probabilities(logits, *bounded()).max(dim=1).values
        wrong = torch.log1p(-confidence.exp().clamp(max=1 - 1e-12))
        surprise: Tensor = -(right * confidence + (1 - right) * wrong).mean()
        surprise.backward()  # type: ignore[no-untyped-call]
        return surprise

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    if not place.isfinite().all():  # because some logit was not
        return Scaling()
    return Scaling(*bounded().tolist())


def _log_probabilities(logits: Tensor, temperature: float | Tensor, exponent: float | Tensor) -> Tensor:
    entropy = torch.special.entr(logits.softmax(dim=1)).sum(dim=1, keepdim=True) / math.log(max(2, logits.shape[1]))
    behind = logits - logits.max(dim=1, keepdim=True).values
    scaled: Tensor = behind / (temperature * entropy.clamp(min=LOWEST_ENTROPY) ** exponent)
    return scaled.log_softmax(dim=1)


def expected_calibration_error(confidences: Tensor, correct: Tensor) -> float:
    """Average the gap between accuracy and confidence over 15 bins of equal width, weighted by images per bin.

    Args:
        confidences: (M,) probabilities of the answers, 0..1.
        correct: (M,) bool, whether each was right.

    Returns:
        A fraction, 0..1.
    """
    bins = (confidences * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    gaps = torch.zeros(NUM_BINS, dtype=torch.float64)
    gaps.index_add_(0, bins.cpu(), (confidences.double() - correct.double()).cpu())
    return float(gaps.abs().sum() / len(confidences))
