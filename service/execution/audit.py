"""Runs some of the answered images again at the most accurate sub-network, in idle moments.

It counts how often both answers agree, and how often they must agree at least if the profile is true: accuracies on the
images that the profile was measured on may not hold for the images of requests. An audit cannot know which answer is
right; `POST /feedback` can.
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

KEPT = 4  # images per sub-network that wait for their audit: 26 MB for 44 sub-networks and images of 150 kB
SHARE = 0.01  # most of the engine's time for audits: they cost energy, and a thousand tell as much as a million


class Count(Protocol):
    """Records an audit."""

    def __call__(self, subnetwork: SubNetwork, promised: float, *, agrees: bool) -> None:
        """Count an audit: the sub-network that answered, the least probability of agreement, and whether it agrees."""
        ...


@dataclass(frozen=True, slots=True)
class _Answered:
    """An image and the answer to it.

    Attributes:
        pixels: (3, S, S) uint8, as decoded: in its own memory, independent of the message that brought it.
        answer: index of the class that was ranked first.
    """

    pixels: Tensor
    answer: int


class Audit:
    """Audits the first looks at images, each at most once; an IdleWork.

    Second looks are left out: they see the hard images, about which the profile promises nothing.
    """

    def __init__(
        self, run: Run, scheduler: Scheduler, count: Count, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Create an audit from its collaborators.

        Args:
            run: the engine's `run`.
            scheduler: knows the variants and predicts how long they take.
            count: called with the result of each audit.
            clock: monotonic, in seconds; the clock of the scheduler.
        """
        self._run, self._scheduler, self._count, self._clock = run, scheduler, count, clock
        self._best = scheduler.catalog.best_single
        self._kept: dict[SubNetworkProfile, deque[_Answered]] = {}
        self._audited: Counter[SubNetworkProfile] = Counter()
        self._next_at, self._is_over = -math.inf, self._best.profile.top1 is None

    def starts_at(self) -> float | None:
        """Return when the next image may be audited; None where no image waits."""
        return self._next_at if any(self._kept.values()) else None

    def due(self, now: float, room: Room) -> IdleBatch | None:
        """Choose an image of the sub-network with the fewest audits so far."""
        waiting = [profile for profile, kept in self._kept.items() if kept]
        if not waiting or now < self._next_at:
            return None
        expected_s = self._scheduler.predict(self._best, 1, now)
        if expected_s > room.seconds:
            return None
        profile = min(waiting, key=self._audited.__getitem__)
        audit = partial(self._audit, profile, self._kept[profile].popleft())
        return IdleBatch(expected_s, audit, f"an audit at {self._best} failed; no further audits will run")

    def batch_ran(self, images: Sequence[Tensor], results: Sequence[Result]) -> None:
        """Keep images of a batch, at most KEPT of each sub-network."""
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
        """Stop auditing, and release all images."""
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
    """Return a lower bound of how often two classifiers agree, from their accuracies on the same images.

    Both agree where both are right. Those are all images but the ones on which the first is wrong (1 - top1) or the
    second is (1 - other_top1), in the worst case never the same images: 1 - (1 - top1) - (1 - other_top1), Boole's
    inequality. The bound is low, because two sub-networks of the same weights mostly fail on the same images. So an
    agreement below it needs an explanation.
    """
    return max(0.0, top1 + other_top1 - 1)
