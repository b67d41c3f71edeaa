"""Recent work of a model: a few of its images, to compare another model on them, and counts of answers and failures."""

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from models.subnetwork import SubNetwork
from service.execution.results import Ranked

KEPT_IMAGES = 32
KEPT_SHAPES = 256  # batches whose shapes are kept: about ten seconds of load


@dataclass(frozen=True, slots=True)
class SampledImage:
    """An image that was answered.

    Attributes:
        pixels: (3, S, S) uint8.
        subnetwork: the sub-network that answered it.
    """

    pixels: Tensor
    subnetwork: SubNetwork


class LiveSample:
    """A sample of the served images, filled on the engine's thread with one image per batch; read on any other thread.

    Attributes:
        num_answered: images that got an answer.
        num_failed: images on which the model failed or whose probabilities are not finite.
    """

    def __init__(self) -> None:
        self.num_answered = self.num_failed = 0
        self._images: deque[SampledImage] = deque(maxlen=KEPT_IMAGES)
        self._shapes: deque[tuple[SubNetwork, int]] = deque(maxlen=KEPT_SHAPES)

    def answered(self, images: Sequence[Tensor], subnetwork: SubNetwork, ranked: Sequence[Ranked]) -> None:
        """Record a batch that ran."""
        self._images.append(SampledImage(images[0], subnetwork))
        self._shapes.append((subnetwork, len(images)))
        wrong = sum(not math.isfinite(each.probabilities[0]) for each in ranked)
        self.num_failed += wrong
        self.num_answered += len(ranked) - wrong

    def failed(self) -> None:
        """Record an image on which the model failed."""
        self.num_failed += 1

    def shapes(self) -> list[tuple[SubNetwork, int]]:
        """Return the distinct sub-networks and sizes of the last batches, the most frequent first."""
        return [shape for shape, _ in Counter(self._shapes.copy()).most_common()]

    def take(self) -> SampledImage | None:
        """Remove and return the oldest image; None where there is none."""
        try:
            return self._images.popleft()
        except IndexError:
            return None
