"""Runs some of the images that were answered again at the most accurate sub-network, in idle moments.

It counts how often both agree, beside how often they must if the profile is true: what held on the images that the
profile was measured on may not hold on those that come. Which answer is right it cannot know; `POST /feedback` can.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork
from service.engines.base import Run
from service.execution.idle_turns import IdleBatch, Room
from service.execution.results import Result
from service.scheduling.scheduler import Scheduler

KEPT = 4  # images of each sub-network that wait for their audit: 26 MB where there are 44 of 150 kB each
SHARE = 0.01  # of the engine's time that audits take at most: they cost energy, and a thousand say as much as a million


class Count(Protocol):
    """Takes note of an audit."""

    def __call__(self, subnetwork: SubNetwork, promised: float, *, agrees: bool) -> None:
        """Count it: whose answer it was of, how probable it was at least to agree, and whether it did."""
        ...


@dataclass(frozen=True, slots=True)
class _Answered:
    """What was answered to an image.

    Attributes:
        pixels: (3, S, S) uint8, as it was decoded: in memory of its own, whatever message brought it.
        answer: index of the class that was taken for the most probable.
    """

    pixels: Tensor
    answer: int


class Audit:
    """Audits the first looks at images, each at most once; an IdleWork.

    Second looks are left out: they see the images that are hard, of which the profile promises nothing.
    """

    def __init__(
        self, run: Run, scheduler: Scheduler, count: Count, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take what it works with.

        Args:
            run: the engine's.
            scheduler: knows the variants, and how long they take.
            count: takes note of what is found.
            clock: monotonic, in seconds; the scheduler's.
        """
        self._run, self._scheduler, self._count, self._clock = run, scheduler, count, clock
        self._best = scheduler.catalog.best_alone
        self._kept: dict[SubNetworkProfile, deque[_Answered]] = {}
        self._audited: Counter[SubNetworkProfile] = Counter()
        self._next_at, self._is_over = -math.inf, self._best.profile.top1 is None

    def starts_at(self) -> float | None:
        """Tell when the next image may be audited; None where none waits for it."""
        return self._next_at if any(self._kept.values()) else None

    def due(self, now: float, room: Room) -> IdleBatch | None:
        """Choose an image: of the sub-network of which the fewest were audited."""
        waiting = [profile for profile, kept in self._kept.items() if kept]
        if not waiting or now < self._next_at:
            return None
        expected_s = self._scheduler.predict(self._best, 1, now)
        if expected_s > room.seconds:
            return None
        profile = min(waiting, key=self._audited.__getitem__)
        audit = partial(self._audit, profile, self._kept[profile].popleft())
        return IdleBatch(expected_s, audit, f"an audit at {self._best} failed; there will be no others")

    def batch_ran(self, images: Sequence[Tensor], results: Sequence[Result]) -> None:
        """Keep images, while there is room for those of their sub-network."""
        profile = results[0].variant.profile
        if self._is_over or profile.top1 is None or profile.subnetwork == self._best.profile.subnetwork:
            return
        kept = self._kept.setdefault(profile, deque())
        for image, result in zip(images, results, strict=True):
            if len(kept) == KEPT:
                return
            if result.before is None and math.isfinite(result.confidence):
                kept.append(_Answered(image, int(result.ranking[0])))

    def close(self) -> None:
        """Audit no more, and keep no image."""
        self._is_over = True
        self._kept.clear()

    def _audit(self, profile: SubNetworkProfile, answered: _Answered) -> float:
        started_at = self._clock()
        logits = self._run(answered.pixels[None], self._best.profile.subnetwork).numpy()
        seconds = self._clock() - started_at
        self._next_at = started_at + seconds / SHARE
        self._audited[profile] += 1
        promised = least_agreement(profile.top1 or 0.0, self._best.profile.top1 or 0.0)
        self._count(profile.subnetwork, promised, agrees=int(logits[0].argmax()) == answered.answer)
        return seconds


def least_agreement(top1: float, other_top1: float) -> float:
    """Return how often two classifiers agree at least, of their accuracies on the same images.

    Where both are right they agree, and that is all of the images but those on which one is wrong (1 - top1) or the
    other (1 - other_top1), at worst never the same ones: 1 - (1 - top1) - (1 - other_top1), Boole's inequality. It is
    low, as two sub-networks of the same weights mostly fail on the same images: so what lies below it needs a reason.
    """
    return max(0.0, top1 + other_top1 - 1)
