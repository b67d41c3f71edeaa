"""The result of one image: logits, probabilities and ranking of the classes, and the decision and batch behind them."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from models.profiles import LOWEST_ENTROPY
from service.domain import LookCode
from service.scheduling.state import BatchDecision
from service.scheduling.variants import Variant

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


class Ranked(NamedTuple):
    """The logits, probabilities and ranking of one image, as in a Result."""

    logits: Floats
    probabilities: Floats
    ranking: Indices


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one look at the image of a request.

    Attributes:
        logits: (classes,).
        probabilities: (classes,), softmax of the logits at the sub-network's temperature; all NaN where a logit is NaN.
        ranking: (classes,), indices of the classes, the most probable first.
        variant: the variant that was chosen; of a cascade, only the first look ran.
        decision: the scheduler's decision, with its reason.
        batch_size: images that ran together.
        predicted_s: predicted seconds of the batch.
        inference_s: measured seconds of the batch.
        started_at: when the batch started, on the monotonic clock.
        ended_at: when the batch ended, on the same clock.
        before: the previous look, which was not sure enough; None for the first look.
        stopped: why no other look follows.
        second_look_cancelled: whether the request waited for another look that did not come.
    """

    logits: Floats
    probabilities: Floats
    ranking: Indices
    variant: Variant
    decision: BatchDecision
    batch_size: int
    predicted_s: float
    inference_s: float
    started_at: float
    ended_at: float
    before: "Result | None" = None
    stopped: LookCode = LookCode.SURE
    second_look_cancelled: bool = False

    @property
    def looks(self) -> "tuple[Result, ...]":
        """All looks at the image, in order."""
        return (self,) if self.before is None else (*self.before.looks, self)

    @property
    def confidence(self) -> float:
        """The calibrated probability of the answer; NaN where a logit is NaN."""
        return float(self.probabilities[self.ranking[0]])

    @property
    def spent_macs(self) -> int:
        """MACs of all looks together."""
        return sum(look.variant.profile.macs for look in self.looks)


def rank(logits: Floats, temperature: float, entropy_exponent: float) -> list[Ranked]:
    """Compute the probabilities and rankings of the (B, classes) logits of a batch.

    `temperature` and `entropy_exponent` are those of `SubNetworkProfile`. The engine's thread ranks the whole batch at
    once: sorting on the event loop would release the GIL for every answer.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # infinity minus infinity
        behind = logits - logits.max(axis=1, keepdims=True)
        spread = _entropy(behind) ** entropy_exponent if entropy_exponent else 1.0
        probabilities = _softmax(behind / (temperature * spread))
    ranking = np.argsort(-logits, axis=1, kind="stable")  # by logits: far below the maximum, all probabilities are 0
    return list(map(Ranked, logits, probabilities, ranking))


def _softmax(behind: Floats) -> Floats:
    """Return the softmax of each row of (B, classes) values whose maximum is 0."""
    weights: Floats = np.exp(behind)
    shares: Floats = weights / weights.sum(axis=1, keepdims=True)
    return shares


def _entropy(behind: Floats) -> Floats:
    """Return the (B, 1) softmax entropies of rows whose maximum is 0, as fractions of the largest possible entropy."""
    probabilities = _softmax(behind)
    smallest = np.finfo(np.float32).tiny
    entropy: Floats = -(probabilities * np.log(np.maximum(probabilities, smallest))).sum(axis=1, keepdims=True)
    share: Floats = np.maximum(entropy / np.float32(math.log(max(2, behind.shape[1]))), np.float32(LOWEST_ENTROPY))
    return share
