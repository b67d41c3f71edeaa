"""What the engine answers to an image: the classes, the most probable first, and how it came about."""

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
    """Of one image: logits, probabilities and ranking, as in a Result."""

    logits: Floats
    probabilities: Floats
    ranking: Indices


@dataclass(frozen=True, slots=True)
class Result:
    """What a look at the image of one request said.

    Attributes:
        logits: (classes,).
        probabilities: (classes,), their softmax at the sub-network's temperature; all NaN where some logit is NaN.
        ranking: (classes,), the indices of the classes, the most probable first.
        variant: what ran; of a cascade its first look.
        decision: the whole of it, its reason included.
        batch_size: images that ran together.
        predicted_s: what the batch was expected to take.
        inference_s: what it took.
        started_at: when it began, on the monotonic clock.
        ended_at: when it ended.
        before: the look before this one, which was not sure enough.
        stopped: why no other follows.
        waited_in_vain: whether it waited for another look that did not come.
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
    waited_in_vain: bool = False

    @property
    def looks(self) -> "tuple[Result, ...]":
        """All looks at the image, the first first."""
        return (self,) if self.before is None else (*self.before.looks, self)

    @property
    def confidence(self) -> float:
        """The calibrated probability of the answer; NaN where some logit is NaN."""
        return float(self.probabilities[self.ranking[0]])

    @property
    def spent_macs(self) -> int:
        """Multiply-accumulates of all looks."""
        return sum(look.variant.profile.macs for look in self.looks)


def rank(logits: Floats, temperature: float, entropy_exponent: float) -> list[Ranked]:
    """Read the (B, classes) logits of a batch; the temperature is that of `SubNetworkProfile`, entropy included.

    It is for the engine's thread, all at once: sorting on the event loop would give the GIL away for every answer.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # infinity less infinity
        behind = logits - logits.max(axis=1, keepdims=True)
        spread = _entropy(behind) ** entropy_exponent if entropy_exponent else 1.0
        probabilities = _softmax(behind / (temperature * spread))
    ranking = np.argsort(-logits, axis=1, kind="stable")  # far behind, probabilities are all 0
    return list(map(Ranked, logits, probabilities, ranking))


def _softmax(behind: Floats) -> Floats:
    """Return the softmax of each row of (B, classes) whose greatest is 0."""
    weights: Floats = np.exp(behind)
    shares: Floats = weights / weights.sum(axis=1, keepdims=True)
    return shares


def _entropy(behind: Floats) -> Floats:
    """Return the entropy of the softmax of each such row, over the greatest there is: (B, 1)."""
    probabilities = _softmax(behind)
    smallest = np.finfo(np.float32).tiny
    entropy: Floats = -(probabilities * np.log(np.maximum(probabilities, smallest))).sum(axis=1, keepdims=True)
    share: Floats = np.maximum(entropy / np.float32(math.log(max(2, behind.shape[1]))), np.float32(LOWEST_ENTROPY))
    return share
