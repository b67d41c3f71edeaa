"""What a model answered of late: a few of the images, to hold another model against it, and how its answers were."""

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from models.subnetwork import SubNetwork
from service.execution.results import Ranked

KEPT_IMAGES = 32
KEPT_SHAPES = 256  # of batches: about ten seconds of load


@dataclass(frozen=True, slots=True)
class SampledImage:
    """An image that was answered.

    Attributes:
        pixels: (3, S, S) uint8.
        subnetwork: that answered it.
    """

    pixels: Tensor
    subnetwork: SubNetwork


class LiveSample:
    """Filled on the engine's thread, one image a batch; read on any other.

    Attributes:
        num_answered: images that had an answer.
        num_failed: images on which the model failed, or of which it said what is no number.
    """

    def __init__(self) -> None:
        self.num_answered = self.num_failed = 0
        self._images: deque[SampledImage] = deque(maxlen=KEPT_IMAGES)
        self._shapes: deque[tuple[SubNetwork, int]] = deque(maxlen=KEPT_SHAPES)

    def answered(self, images: Sequence[Tensor], subnetwork: SubNetwork, ranked: Sequence[Ranked]) -> None:
        """Take note of a batch."""
        self._images.append(SampledImage(images[0], subnetwork))
        self._shapes.append((subnetwork, len(images)))
        wrong = sum(not math.isfinite(each.probabilities[0]) for each in ranked)
        self.num_failed += wrong
        self.num_answered += len(ranked) - wrong

    def failed(self) -> None:
        """Take note of an image on which the model failed."""
        self.num_failed += 1

    def shapes(self) -> list[tuple[SubNetwork, int]]:
        """Return what the last batches ran and how large they were, each once, the most frequent first."""
        return [shape for shape, _ in Counter(self._shapes.copy()).most_common()]

    def take(self) -> SampledImage | None:
        """Take the image that is there for longest, which no other gets then; None where there is none."""
        try:
            return self._images.popleft()
        except IndexError:
            return None
