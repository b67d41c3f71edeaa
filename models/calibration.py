"""Whether probabilities mean what they say, and the temperature that makes them (Guo et al., ICML 2017)."""

import torch
from torch import Tensor

NUM_BINS = 15
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0
HALVINGS = 40


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Find the temperature T at which softmax(logits / T) gives the labels the highest likelihood.

    One more image whose label might be any class, all equally, keeps logits that are never wrong on few images from
    taking them for certainty. The log-likelihood is concave in 1 / T, so its slope has one zero, which halving an
    interval finds.

    Args:
        logits: (M, classes).
        labels: (M,) class indices.

    Returns:
        T, from LOWEST_TEMPERATURE to HIGHEST_TEMPERATURE.
    """
    logits = logits.double()
    any_class = 1 / (1 + len(labels))
    aim = (1 - any_class) * logits.gather(1, labels[:, None]).mean() + any_class * logits.mean()
    low, high = 1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        expected = ((logits * middle).softmax(dim=1) * logits).sum(dim=1).mean()
        low, high = (middle, high) if expected < aim else (low, middle)
    return float((low * high) ** -0.5)


def expected_calibration_error(confidences: Tensor, correct: Tensor) -> float:
    """Average how far accuracy lies from confidence over 15 bins of equal width, weighted by how many fall into each.

    Args:
        confidences: (M,) probabilities of the classes that were answered, 0..1.
        correct: (M,) bool, whether each was right.

    Returns:
        A fraction, 0..1.
    """
    bins = (confidences * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    gaps = torch.zeros(NUM_BINS, dtype=torch.float64)
    gaps.index_add_(0, bins.cpu(), (confidences.double() - correct.double()).cpu())
    return float(gaps.abs().sum() / len(confidences))
