"""When the engine has time for batches that no request waits for, and whose turn it then is.

What they are is for each kind of work to say. All of it runs on the engine's thread.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from service.execution.results import Result
from service.execution.throttle import UtilizationLimiter
from service.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

QUIET_S = 0.05  # without a request, after which the engine counts as idle
# A request that comes while a batch runs waits for its end. So that is this rare, at the rate at which they come, ...
ARRIVALS = 0.1
BUDGET_SHARE = 0.25  # ... and takes no more than this of a tight budget, ...
QUIET_SHARE = 0.1  # ... unless none has come for so long that a batch takes only this share of that time.
BUSY = 0.15  # share of the CPUs that others use from which on nothing runs: it would slow them, and they it
RECHECK_S = 0.25  # until another look, where others' load, another process or too dear a batch stood in the way


@dataclass(frozen=True, slots=True)
class Room:
    """What there is room for at this moment.

    Attributes:
        seconds: that a batch may take at most; 0 where none may run.
        max_batch_size: images that it may have at most.
    """

    seconds: float
    max_batch_size: int


@dataclass(frozen=True, slots=True)
class IdleBatch:
    """A batch for an idle moment.

    Attributes:
        expected_s: what it should take.
        run: runs it; returns the seconds that the engine took.
        if_it_fails: what the log then says.
    """

    expected_s: float
    run: Callable[[], float]
    if_it_fails: str


class IdleWork(Protocol):
    """What an engine can do in idle moments, batch by batch."""

    def starts_at(self) -> float | None:
        """Tell from when on there may be something to run; None where there is not, unless requests bring it."""
        ...

    def due(self, now: float, room: Room) -> IdleBatch | None:
        """Choose what to run now, which then is run; None where there is nothing, or no room for it."""
        ...

    def batch_ran(self, images: Sequence[Tensor], results: Sequence[Result]) -> None:
        """Hear of a batch of requests: their images, each (3, S, S) uint8, and what the look at each said."""
        ...

    def close(self) -> None:
        """Run no more."""
        ...


class IdleTurns:
    """Gives the engine's idle moments away: each to the first work that has a batch which there is room for.

    Attributes:
        running: when the batch that runs began, and what it should take; None where none runs.
    """

    def __init__(
        self,
        works: Sequence[IdleWork],
        scheduler: Scheduler,
        default_budget_s: float,
        limiter: UtilizationLimiter | None = None,
        observe_machine: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take what there is to do.

        Args:
            works: in the order in which they are asked for a batch.
            scheduler: knows the load, and plans around a batch that runs.
            default_budget_s: granted to a request that names none.
            limiter: holds these batches back for the sake of a ceiling, as it does those of requests.
            observe_machine: called before each look; tells the scheduler of the machine, and returns the share of what
                this engine computes on that others use, 0..1.
            clock: monotonic, in seconds; the scheduler's.
        """
        self.running: tuple[float, float] | None = None
        self._works, self._scheduler, self._default_budget_s = works, scheduler, default_budget_s
        self._limiter = limiter or UtilizationLimiter(None, None)
        self._observe_machine, self._clock = observe_machine, clock
        self._active_at = self._look_at = clock()

    def wait_s(self, *, is_expecting: bool) -> float | None:
        """Tell how long to wait for a request before `take_turn`; None where there is nothing to do.

        Args:
            is_expecting: whether there are requests that will come to the engine.
        """
        now = self._clock()
        if is_expecting:
            self._active_at = now
        starts = [at for work in self._works if (at := work.starts_at()) is not None]
        if not starts:
            return None
        return max(0.0, max(self._active_at + QUIET_S, self._look_at, min(starts)) - now)

    def take_turn(self) -> None:
        """Run a batch, where there is time for one. Only where no request waits for the engine or a decoder."""
        others = self._observe_machine()
        now = self._clock()
        pause_s = self._limiter.pause_s(now)
        room = self._room(now, is_free=not pause_s and others <= BUSY)
        for work in self._works:
            if (batch := work.due(now, room)) is not None:
                self._run(work, batch, now)
                return
        self._limiter.idle()
        self._look_at = now + max(pause_s, RECHECK_S)

    def batch_ran(self, images: Sequence[Tensor], results: Sequence[Result]) -> None:
        """Hear of a batch of requests, as an IdleWork does."""
        self._active_at = results[0].ended_at
        for work in self._works:
            work.batch_ran(images, results)

    def close(self) -> None:
        """Run no more."""
        for work in self._works:
            work.close()

    def _room(self, now: float, *, is_free: bool) -> Room:
        state = self._scheduler.state(now)
        rate = max(state.arrival_rate, state.sustained_rate)
        unhurried_s = BUDGET_SHARE * min(state.tight_budget_s, self._default_budget_s)
        unmet_s = ARRIVALS / rate if rate else unhurried_s
        quiet_s = now - max(self._active_at, state.last_arrival_at)
        seconds = max(min(unhurried_s, unmet_s), QUIET_SHARE * quiet_s) if is_free else 0.0
        return Room(seconds, state.max_batch_size)

    def _run(self, work: IdleWork, batch: IdleBatch, now: float) -> None:
        self.running = now, batch.expected_s
        self._scheduler.engine_taken(now + batch.expected_s)
        try:
            seconds = batch.run()
        except Exception:  # whatever the engine raises: what that means for requests shows when they come
            logger.exception(batch.if_it_fails)
            work.close()
        else:
            self._limiter.batch_ran(seconds)
        finally:
            self.running = None
            self._scheduler.engine_taken(self._clock())
