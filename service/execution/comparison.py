"""Compares a new model with the served one, on images that the served one has answered: agreement and latency."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.subnetwork import SubNetwork
from service.engines.base import Run
from service.errors import ModelChangeError
from service.execution.live_sample import SampledImage

TIMED_IMAGES = 8  # fewer say nothing about latency: one batch during a neighbour's burst takes three times as long
NOT_FINITE = "the new model's output is not finite"


@dataclass(frozen=True, slots=True)
class Contender:
    """A model to compare.

    Attributes:
        run: runs a batch, and holds the engine for no longer than that takes.
        clock: returns the seconds that the engine has worked for `run`.
        class_names: one per logit.
    """

    run: Run
    clock: Callable[[], float]
    class_names: tuple[str, ...]


@dataclass(slots=True)
class Comparison:
    """What a comparison has found so far.

    Attributes:
        num_images: images that both models have answered.
        num_agreeing: images to which both models gave the same class name.
    """

    num_images: int = 0
    num_agreeing: int = 0
    _ratios: list[float] = field(default_factory=list)

    @property
    def agreement(self) -> float | None:
        """Share of the images to which both models gave the same class name, 0..1; None where there are no images."""
        return self.num_agreeing / self.num_images if self.num_images else None

    @property
    def latency_ratio(self) -> float | None:
        """Median of the new model's latency over the old one's; None for fewer than TIMED_IMAGES images."""
        return statistics.median(self._ratios) if len(self._ratios) >= TIMED_IMAGES else None

    def add(self, *, agrees: bool, ratio: float) -> None:
        """Count an image."""
        self.num_images += 1
        self.num_agreeing += agrees
        self._ratios.append(ratio)


class Comparer:
    """Runs two models on the same images with the same sub-networks, one after the other."""

    def __init__(self, old: Contender, new: Contender) -> None:
        """Create from both models."""
        self._old, self._new = old, new
        self._prepared: set[SubNetwork] = set()
        self.found = Comparison()

    def compare(self, image: SampledImage) -> None:
        """Run both models on an image.

        Raises:
            ModelChangeError: a logit of the new model is NaN or infinite.
        """
        if image.subnetwork not in self._prepared:
            self._answer(self._new, image)  # a library does first-time work for each new shape
            self._prepared.add(image.subnetwork)
        (old, old_s), (new, new_s) = (self._answer(each, image) for each in (self._old, self._new))
        if not new.isfinite().all():
            raise ModelChangeError(NOT_FINITE)
        said = (self._old.class_names[int(old.argmax())], self._new.class_names[int(new.argmax())])
        self.found.add(agrees=said[0] == said[1], ratio=new_s / max(old_s, 1e-9))

    def _answer(self, contender: Contender, image: SampledImage) -> tuple[Tensor, float]:
        before_s = contender.clock()
        logits = contender.run(image.pixels[None], image.subnetwork)
        return logits[0], contender.clock() - before_s


def require_finite(run: Run, image_side: int, subnetworks: tuple[SubNetwork, ...]) -> None:
    """Run each sub-network once, on an image of zeros, and check its logits.

    Raises:
        ModelChangeError: a logit is NaN or infinite.
    """
    blank = torch.zeros(1, 3, image_side, image_side, dtype=torch.uint8)
    for subnetwork in subnetworks:
        if not run(blank, subnetwork).isfinite().all():
            raise ModelChangeError(NOT_FINITE)
