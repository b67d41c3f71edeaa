"""Measures the rest of the latency profile while the engine is idle, and learns from the batches of requests.

The profile chooses the next cell, and `idle_turns` decides when there is time for one. All of it runs on the engine's
thread.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from models.latency_estimate import Cell
from service.engines.growing_profile import SERVED_RUN_WEIGHT, GrowingProfile, Prediction
from service.engines.profiler import Figures
from service.execution.idle_turns import IdleBatch, Room
from service.execution.results import Result
from service.scheduling.estimators import STALE_AFTER_S, Slowdown

logger = logging.getLogger(__name__)

PUBLISH_S = 2.0  # seconds between two updates of the latencies that the scheduler plans with
SAVE_INTERVAL_S = 10.0  # seconds between two versions of the file
WARM_UP_S = 4.0  # predicted seconds of warm-up batches, whose times do not count, after which no more run


class SaveProfile(Protocol):
    """Where the profile is kept, shared with other processes."""

    def claim(self) -> bool:
        """Try to become the process that measures; return whether that succeeded."""
        ...

    def release(self) -> None:
        """Let another process measure."""
        ...

    def read_if_changed(self) -> Figures | None:
        """Read what another process has measured since the last read; None where that is nothing."""
        ...

    def write(self, figures: Figures) -> None:
        """Store the figures."""
        ...


class IdleProfiler:
    """Completes a latency profile in idle moments; an IdleWork."""

    def __init__(
        self,
        profile: GrowingProfile,
        keeper: SaveProfile,
        time_once: Callable[[Cell], float],
        publish: Callable[[Prediction], None],
        shapes: Iterable[Cell] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create a profiler, and publish what its profile knows already.

        Args:
            profile: latency profile of this machine, with at least one cell known.
            keeper: stores the profile.
            time_once: runs a cell and returns its seconds.
            publish: called with the latencies to plan with from now on.
            shapes: further cells to run once, because a library does first-time work for each new shape.
            clock: monotonic, in seconds.
        """
        self._profile, self._keeper, self._time_once, self._publish = profile, keeper, time_once, publish
        self._shapes, self._warming_s = deque(shapes), 0.0
        self._pace = Slowdown()  # learned from the batches of measured cells alone
        self._published_at = self._kept_at = clock()
        self._has_claim = self._is_over = False
        self._num_news = self._num_published = self._num_kept = 0
        publish(profile.predict())

    @property
    def measured_share(self) -> float:
        """Share of the profile that is measured, 0..1."""
        return self._profile.measured_share

    def starts_at(self) -> float | None:
        """Return minus infinity while cells are left, as a cell may be measured at any time; None after that."""
        return None if self._is_over else -math.inf

    def due(self, now: float, room: Room) -> IdleBatch | None:
        """Choose a cell to measure; also publish and store what is new."""
        if self._is_over:
            return None
        self._share(now)
        cell = self._next_cell(room)
        if cell is None:
            return None
        failure = f"a batch of {cell[1]} at {cell[0]} failed; the rest of the profile stays an estimate"
        return IdleBatch(self._profile.predicted_s(cell), partial(self._measure, cell), failure)

    def batch_ran(self, images: Sequence[Tensor], results: Sequence[Result]) -> None:  # noqa: ARG002 - others use them
        """Learn from a batch of requests.

        Others' load and the server's own work make it slower than it would be alone. Batches of measured cells just
        before it tell by what factor. Without any, it tells nothing about its cell.
        """
        if self._is_over:
            return
        result = results[0]
        cell, seconds, now = (result.variant.profile.subnetwork, len(results)), result.inference_s, result.ended_at
        measured_s = self._profile.seconds(cell)
        if measured_s is not None:
            self._pace = self._pace.updated(seconds / measured_s, now)
        elif self._pace.updated_at is not None and now - self._pace.updated_at < STALE_AFTER_S:
            self._record(cell, seconds / self._pace.factor, SERVED_RUN_WEIGHT)
            self._share(now)

    def close(self) -> None:
        """Stop measuring, store what is measured, and let another process continue."""
        self._is_over = True
        if self._has_claim:
            self._save()
            self._keeper.release()
            self._has_claim = False

    def _next_cell(self, room: Room) -> Cell | None:
        if self._has_claim and not self._profile.is_complete:
            due = self._profile.due(lambda cell, s: s <= room.seconds and cell[1] <= room.max_batch_size)
            return None if due is None else due[0]
        if self._shapes and self._profile.predicted_s(self._shapes[0]) <= room.seconds:
            cell = self._shapes.popleft()
            self._warming_s += self._profile.predicted_s(cell)
            if self._warming_s > WARM_UP_S:
                self._shapes.clear()
            return cell
        return None

    def _measure(self, cell: Cell) -> float:
        seconds = self._time_once(cell)
        self._record(cell, seconds)
        return seconds

    def _record(self, cell: Cell, seconds: float, worth: float = 1.0) -> None:
        self._num_news += self._profile.record(cell, seconds, worth)

    def _share(self, now: float) -> None:
        """Publish and store what is new, at intervals, and take over what another process has measured."""
        if not self._has_claim and not self._profile.is_complete:
            self._has_claim = self._keeper.claim()
            if found := self._keeper.read_if_changed():
                self._profile.merge(found)
                self._num_news += 1
        is_complete = self._profile.is_complete
        if self._num_news > self._num_published and (is_complete or now - self._published_at >= PUBLISH_S):
            self._num_published, self._published_at = self._num_news, now
            self._publish(self._profile.predict())
        if (
            self._has_claim
            and self._num_news > self._num_kept
            and (is_complete or now - self._kept_at >= SAVE_INTERVAL_S)
        ):
            self._kept_at = now
            self._save()
        if is_complete and self._has_claim:
            logger.info("all latencies are measured")
            self._keeper.release()
            self._has_claim = False
        self._is_over = self._is_over or (is_complete and not self._shapes)

    def _save(self) -> None:
        self._num_kept = self._num_news
        if found := self._keeper.read_if_changed():  # `supervit profile` may have measured as well
            self._profile.merge(found)
        self._keeper.write(self._profile.figures)
