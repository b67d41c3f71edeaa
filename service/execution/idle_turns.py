"""Decides when the engine has time for batches that no request waits for, and which kind of work gets that time.

Each kind of work chooses its own batches. All of it runs on the engine's thread.
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

QUIET_S = 0.05  # seconds without a request after which the engine counts as idle
# A request that arrives during an idle batch waits for its end. So an idle batch is so short that:
MAX_EXPECTED_ARRIVALS = 0.1  # no more than this many requests are expected during it, at the current rate, ...
BUDGET_SHARE = 0.25  # ... and it takes no more than this share of a tight latency budget, ...
MAX_SHARE_OF_QUIET = 0.1  # ... unless no request has come for so long that it takes only this share of that time.
MAX_OTHERS_LOAD = (
    0.15  # share of the CPUs used by others above which no idle batch runs: each would slow the other down
)
RECHECK_S = 0.25  # seconds to the next check, where others' load, another process or too long a batch was in the way


@dataclass(frozen=True, slots=True)
class Room:
    """The room for an idle batch at this moment.

    Attributes:
        seconds: the most that the batch may take; 0 where none may run.
        max_batch_size: the most images that it may have.
    """

    seconds: float
    max_batch_size: int


@dataclass(frozen=True, slots=True)
class IdleBatch:
    """A batch for an idle moment.

    Attributes:
        expected_s: expected seconds of the batch.
        run: runs the batch and returns the seconds that the engine took.
        failure_message: message to log where it fails.
    """

    expected_s: float
    run: Callable[[], float]
    failure_message: str


class IdleWork(Protocol):
    """A kind of work that an engine can do in idle moments, batch by batch."""

    def starts_at(self) -> float | None:
        """Return the instant from which a batch may be due; None where none will be, unless requests bring one."""
        ...

    def due(self, now: float, room: Room) -> IdleBatch | None:
        """Choose a batch, which the caller then runs; None where there is none, or no room for it."""
        ...

    def batch_ran(self, images: Sequence[Tensor], results: Sequence[Result]) -> None:
        """Observe a batch of requests: their images, each (3, S, S) uint8, and the result of the look at each."""
        ...

    def close(self) -> None:
        """Stop: no batch is due any more."""
        ...


class IdleTurns:
    """Gives each idle moment of the engine to the first kind of work that has a batch for which there is room.

    Attributes:
        running: when the current idle batch began, and its expected seconds; None where none runs.
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
        """Create from the kinds of idle work and their collaborators.

        Args:
            works: the kinds of work, in the order in which they are asked for a batch.
            scheduler: knows the load, and plans around an idle batch that runs.
            default_budget_s: latency budget of a request that names none.
            limiter: delays these batches, like those of requests, to keep below a utilization ceiling.
            observe_machine: called before each turn; tells the scheduler the state of the machine, and returns the
                share, 0..1, of this engine's processors that others use.
            clock: monotonic, in seconds; the clock of the scheduler.
        """
        self.running: tuple[float, float] | None = None
        self._works, self._scheduler, self._default_budget_s = works, scheduler, default_budget_s
        self._limiter = limiter or UtilizationLimiter(None, None)
        self._observe_machine, self._clock = observe_machine, clock
        self._active_at = self._look_at = clock()

    def wait_s(self, *, is_expecting: bool) -> float | None:
        """Return how long to wait for a request before `take_turn`; None where there is no idle work.

        Args:
            is_expecting: whether there are requests that will reach the engine.
        """
        now = self._clock()
        if is_expecting:
            self._active_at = now
        starts = [at for work in self._works if (at := work.starts_at()) is not None]
        if not starts:
            return None
        return max(0.0, max(self._active_at + QUIET_S, self._look_at, min(starts)) - now)

    def take_turn(self) -> None:
        """Run a batch, if there is time for one. Call it only while no request waits for the engine or a decoder."""
        others = self._observe_machine()
        now = self._clock()
        pause_s = self._limiter.pause_s(now)
        room = self._room(now, is_free=not pause_s and others <= MAX_OTHERS_LOAD)
        for work in self._works:
            if (batch := work.due(now, room)) is not None:
                self._run(work, batch, now)
                return
        self._limiter.idle()
        self._look_at = now + max(pause_s, RECHECK_S)

    def batch_ran(self, images: Sequence[Tensor], results: Sequence[Result]) -> None:
        """Observe a batch of requests, and pass it to every kind of work."""
        self._active_at = results[0].ended_at
        for work in self._works:
            work.batch_ran(images, results)

    def close(self) -> None:
        """Stop all kinds of work."""
        for work in self._works:
            work.close()

    def _room(self, now: float, *, is_free: bool) -> Room:
        state = self._scheduler.state(now)
        rate = max(state.arrival_rate, state.sustained_rate)
        unhurried_s = BUDGET_SHARE * min(state.tight_budget_s, self._default_budget_s)
        unmet_s = MAX_EXPECTED_ARRIVALS / rate if rate else unhurried_s
        quiet_s = now - max(self._active_at, state.last_arrival_at)
        seconds = max(min(unhurried_s, unmet_s), MAX_SHARE_OF_QUIET * quiet_s) if is_free else 0.0
        return Room(seconds, state.max_batch_size)

    def _run(self, work: IdleWork, batch: IdleBatch, now: float) -> None:
        self.running = now, batch.expected_s
        self._scheduler.engine_taken(now + batch.expected_s)
        try:
            seconds = batch.run()
        except Exception:  # whatever the engine raises: whether it fails on requests, too, shows when they come
            logger.exception(batch.failure_message)
            work.close()
        else:
            self._limiter.batch_ran(seconds)
        finally:
            self.running = None
            self._scheduler.engine_taken(self._clock())
