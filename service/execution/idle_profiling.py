"""Measures the rest of the profile while the engine has nothing to do, and learns from the batches of requests.

It decides when there is time for a cell; which one is the profile's business. All of it runs on the engine's thread.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from models.latency_estimate import Cell
from models.subnetwork import SubNetwork
from service.engines.growing_profile import SERVED_WORTH, GrowingProfile, Prediction
from service.engines.profiler import Figures
from service.execution.throttle import UtilizationLimiter
from service.scheduling.estimators import STALE_AFTER_S, Slowdown
from service.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

QUIET_S = 0.05  # without a request, after which the engine counts as idle
# A request that comes while a cell runs waits for its end. So that is this rare, at the rate at which they come, ...
ARRIVALS = 0.1
BUDGET_SHARE = 0.25  # ... and takes no more than this of a tight budget, ...
QUIET_SHARE = 0.1  # ... unless none has come for so long that a cell takes only this share of that time.
BUSY = 0.15  # share of the CPUs that others use from which on they would be measured, too
RECHECK_S = 0.25  # until another look, where others' load, another process or too dear a cell stood in the way
PUBLISH_S = 2.0  # between two updates of what the scheduler plans with
KEEP_S = 10.0  # between two versions of the file
WARM_UP_S = 4.0  # for batches whose time does not count


class Keeper(Protocol):
    """Where the profile is kept, shared with other processes."""

    def claim(self) -> bool:
        """Try to be the process that measures."""
        ...

    def release(self) -> None:
        """Let another one measure."""
        ...

    def read_if_changed(self) -> Figures | None:
        """Read what another process has measured."""
        ...

    def write(self, figures: Figures) -> None:
        """Keep what is measured."""
        ...


class IdleProfiler:
    """Completes a profile.

    Attributes:
        running: when the cell that runs began, and what it should take; None where none runs.
    """

    def __init__(
        self,
        profile: GrowingProfile,
        keeper: Keeper,
        time_once: Callable[[Cell], float],
        scheduler: Scheduler,
        publish: Callable[[Prediction], None],
        default_budget_s: float,
        shapes: Iterable[Cell] = (),
        limiter: UtilizationLimiter | None = None,
        observe_machine: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take what to complete, and publish what is known of it.

        Args:
            profile: of this machine, which knows a little.
            keeper: of it.
            time_once: runs a cell, and returns its seconds.
            scheduler: knows the load, and plans around a cell that runs.
            publish: takes what to plan with from now on.
            default_budget_s: granted to a request that names none.
            shapes: other batches to run once, because a library prepares itself for the first of a shape.
            limiter: holds cells back for the sake of a ceiling, as it does batches.
            observe_machine: called before each look; tells the scheduler of the machine, and returns the share of what
                this engine computes on that others use, 0..1.
            clock: monotonic, in seconds; the scheduler's.
        """
        self.running: tuple[float, float] | None = None
        self._profile, self._keeper, self._time_once = profile, keeper, time_once
        self._scheduler, self._publish, self._clock = scheduler, publish, clock
        self._default_budget_s, self._observe_machine = default_budget_s, observe_machine
        self._limiter = limiter or UtilizationLimiter(None, None)
        self._shapes, self._warming_s = deque(shapes), 0.0
        self._pace = Slowdown()  # by the batches of measured cells alone
        self._active_at = self._look_at = self._published_at = self._kept_at = clock()
        self._has_claim = self._is_over = False
        self._num_news = self._num_published = self._num_kept = 0
        publish(profile.predict())

    @property
    def measured_share(self) -> float:
        """How much of the profile is measured, 0..1."""
        return self._profile.measured_share

    def wait_s(self, *, is_expecting: bool) -> float | None:
        """Tell how long to wait for a request before `take_turn`; None where there is nothing left to do.

        Args:
            is_expecting: whether there are requests that will come to the engine.
        """
        if self._is_over:
            return None
        now = self._clock()
        if is_expecting:
            self._active_at = now
        return max(0.0, max(self._active_at + QUIET_S, self._look_at) - now)

    def take_turn(self) -> None:
        """Run a batch, where there is time for one. Only where no request waits for the engine or a decoder."""
        others = self._observe_machine()
        now = self._clock()
        self._share(now)
        pause_s = self._limiter.pause_s(now)
        due = None if pause_s or others > BUSY or self._is_over else self._due(now)
        if due is None:
            self._limiter.idle()
            self._look_at = now + max(pause_s, RECHECK_S)
            return
        cell, expected_s = due
        self.running = now, expected_s
        self._scheduler.engine_taken(now + expected_s)
        try:
            seconds = self._time_once(cell)
        except Exception:  # whatever the engine raises: what that means for requests shows when they come
            logger.exception("a batch of %d at %s failed; the rest of the profile stays an estimate", cell[1], cell[0])
            self.close()
            return
        finally:
            self.running = None
            self._scheduler.engine_taken(self._clock())
        self._limiter.batch_ran(seconds)
        self._record(cell, seconds)

    def batch_ran(self, subnetwork: SubNetwork, size: int, seconds: float, now: float) -> None:
        """Learn from a batch of requests.

        How much slower than alone it ran, because of others' load and the server's own work, is known from batches of
        measured cells just before it. Where there were none, it says nothing of its cell.
        """
        self._active_at = now
        cell = subnetwork, size
        measured_s = self._profile.seconds(cell)
        if measured_s is not None:
            self._pace = self._pace.updated(seconds / measured_s, now)
        elif self._pace.updated_at is not None and now - self._pace.updated_at < STALE_AFTER_S:
            self._record(cell, seconds / self._pace.factor, SERVED_WORTH)
            self._share(now)

    def close(self) -> None:
        """Measure no more; keep what is measured, and let another process go on."""
        self._is_over = True
        if self._has_claim:
            self._keep()
            self._keeper.release()
            self._has_claim = False

    def _due(self, now: float) -> tuple[Cell, float] | None:
        """Find what to run at this moment."""
        state = self._scheduler.state(now)
        rate = max(state.arrival_rate, state.sustained_rate)
        unhurried_s = BUDGET_SHARE * min(state.tight_budget_s, self._default_budget_s)
        unmet_s = ARRIVALS / rate if rate else unhurried_s
        room_s = max(min(unhurried_s, unmet_s), QUIET_SHARE * (now - max(self._active_at, state.last_arrival_at)))
        if self._has_claim and not self._profile.is_complete:
            return self._profile.due(lambda cell, seconds: seconds <= room_s and cell[1] <= state.max_batch_size)
        if self._shapes and self._profile.row_s(self._shapes[0]) <= room_s:
            cell = self._shapes.popleft()
            self._warming_s += self._profile.row_s(cell)
            if self._warming_s > WARM_UP_S:
                self._shapes.clear()
            return cell, self._profile.row_s(cell)
        return None

    def _record(self, cell: Cell, seconds: float, worth: float = 1.0) -> None:
        self._profile.record(cell, seconds, worth)
        self._num_news += 1

    def _share(self, now: float) -> None:
        """Give the scheduler and the file what is new, every now and then, and take what another process has found."""
        if not self._has_claim and not self._profile.is_complete:
            self._has_claim = self._keeper.claim()
            if found := self._keeper.read_if_changed():
                self._profile.merge(found)
                self._num_news += 1
        is_complete = self._profile.is_complete
        if self._num_news > self._num_published and (is_complete or now - self._published_at >= PUBLISH_S):
            self._num_published, self._published_at = self._num_news, now
            self._publish(self._profile.predict())
        if self._has_claim and self._num_news > self._num_kept and (is_complete or now - self._kept_at >= KEEP_S):
            self._kept_at = now
            self._keep()
        if is_complete and self._has_claim:
            logger.info("all latencies are measured")
            self._keeper.release()
            self._has_claim = False
        self._is_over = self._is_over or (is_complete and not self._shapes)

    def _keep(self) -> None:
        self._num_kept = self._num_news
        if found := self._keeper.read_if_changed():  # as `supervit profile` may have measured
            self._profile.merge(found)
        self._keeper.write(self._profile.figures)
