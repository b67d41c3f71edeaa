"""The one thread on which engines run: it gives batchers turns of one batch, and runs short work between batches.

One engine computes at a time, whichever models are served. Nothing is decided here: each batcher chooses its batches.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from service.errors import NotReadyError

WORK_SHARE = 0.1  # share of the engine's time that work between batches may take while requests come ...
QUIET_S = 0.05  # ... and seconds without a batch after which it may take all of the time
GAP_S = 0.3  # for which work that may run waits for a moment in which no request waits
WORK_S = 1.0  # expected seconds of a piece of work, for the watchdog

T = TypeVar("T")

logger = logging.getLogger(__name__)


class EngineUser(Protocol):
    """What gets turns on the thread: a batcher. Everything but `running` is called on the thread.

    Attributes:
        has_work: whether a request waits for the engine.
        is_over: whether no request is left, and none will come.
        running: when its current batch began, and the expected seconds; None where none runs.
    """

    @property
    def has_work(self) -> bool: ...  # noqa: D102 - above
    @property
    def is_over(self) -> bool: ...  # noqa: D102
    @property
    def running(self) -> tuple[float, float] | None: ...  # noqa: D102

    def take_turn(self) -> None:
        """Run a batch."""
        ...

    def rest(self) -> float:
        """Record that nothing waits; return the seconds until `take_idle_turn` is due, possibly infinite."""
        ...

    def take_idle_turn(self) -> None:
        """Run idle work."""
        ...

    def engine_freed(self) -> None:
        """Record that the engine was used by others, or had nothing to do, until now."""
        ...

    def close(self) -> None:
        """Stop: there are no more turns."""
        ...


class EngineThread:
    """The engine's thread and the batchers that take turns on it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Create with nothing to serve; the clock is monotonic, in seconds."""
        self._clock, self._executor = clock, ThreadPoolExecutor(1, "engine")
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._served: dict[EngineUser, Future[None]] = {}
        self._work: deque[tuple[Callable[[], Any], Future[Any], float]] = deque()  # with the time of its submission
        self._is_looping = False
        self._working: tuple[float, float] | None = None
        self._work_due_at = self._batch_at = -math.inf

    @property
    def running(self) -> tuple[float, float] | None:
        """When the current batch or piece of work began, and its expected seconds; None where nothing runs."""
        with self._lock:
            served = list(self._served)
        return self._working or next((each.running for each in served if each.running is not None), None)

    def submit(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function on the thread, while nothing is served there."""
        return self._executor.submit(function)

    def serve(self, served: EngineUser) -> "Future[None]":
        """Give a batcher turns until it is over; the future then has a result, or the exception of a turn."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # it cannot be cancelled, and ends with the batcher
        with self._lock:
            self._served[served] = done
            if not self._is_looping:
                self._is_looping = True
                self._executor.submit(self._loop)
        self._wake.set()
        return done

    def work(self, function: Callable[[], T]) -> "Future[T]":
        """Run a piece of work between two batches, where possible in a moment in which no request waits.

        While requests come, work gets WORK_SHARE of the engine's time. Where nothing is served, or serving ends before
        the work has its turn, its future gets a NotReadyError.
        """
        done: Future[T] = Future()
        with self._lock:
            is_served = self._is_looping
            if is_served:
                self._work.append((function, done, self._clock()))
        if not is_served:
            done.set_exception(NotReadyError("the server is stopping"))
        self._wake.set()
        return done

    def wake(self) -> None:
        """Make the thread check what there is to do."""
        self._wake.set()

    def shutdown(self, *, wait: bool) -> None:
        """End the thread once nothing is served; block until then if `wait`."""
        self._executor.shutdown(wait=wait)

    def _loop(self) -> None:
        try:
            self._give_turns()
        except BaseException as error:  # a bug: the code that waits on these futures must get it
            with self._lock:
                ends = [*self._served.values(), *(done for _, done, _ in self._work)]
                self._is_looping = False
                self._served.clear()
                self._work.clear()
            for done in ends:
                if not done.cancelled():
                    done.set_exception(error)
            raise

    def _give_turns(self) -> None:
        while served := self._still_served():
            wanting = [each for each in served if each.has_work]
            if self._work and self._work_wait_s(is_quiet=not wanting) <= 0:
                self._do_work()
            elif wanting:
                self._give_each_a_turn(wanting)
            else:
                self._rest(served)
            # For a batcher that wants a turn, those of others are time between its batches, which its scheduler learns.
            _tell_freed([each for each in served if each not in wanting])

    def _still_served(self) -> list[EngineUser]:
        """End the batchers that are over, and return the others; if none is left, end the loop and fail all work."""
        with self._lock:
            served = list(self._served)
        for each in served:
            if each.is_over:
                self._end(each)
        with self._lock:
            if self._served:
                return list(self._served)
            self._is_looping, left = False, list(self._work)
            self._work.clear()
        for _, done, _ in left:
            if not done.cancelled():
                done.set_exception(NotReadyError("the server is stopping"))
        return []

    def _give_each_a_turn(self, wanting: Sequence[EngineUser]) -> None:
        for each in wanting:
            with self._ending_on_error(each):
                each.take_turn()
            self._batch_at = self._clock()

    @contextmanager
    def _ending_on_error(self, served: EngineUser) -> Iterator[None]:
        """End a batcher where its block fails."""
        try:
            yield
        except Exception as error:  # whatever a policy or a model raises, the other models must continue
            self._end(served, error)

    def _end(self, served: EngineUser, error: Exception | None = None) -> None:
        with self._lock:
            done = self._served.pop(served)
        try:
            served.close()
        except Exception:  # it ends in any case, and the other models must continue
            logger.exception("a model could not end its idle work")
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def _rest(self, served: Sequence[EngineUser]) -> None:
        """Wait for something to do, and run idle work if nothing comes until it is due.

        While several batchers are served, none does: each knows the requests of its own model only.
        """
        due_s, idler = math.inf, served[0]
        for each in served:
            with self._ending_on_error(each):
                rests_s = each.rest()
                due_s = rests_s if len(served) == 1 else math.inf
        self._wake.clear()
        # Clearing may have discarded a wake-up, so check again.
        if list(self._served) != served or any(each.has_work or each.is_over for each in served):
            return
        wait_s = min(due_s, self._work_wait_s(is_quiet=True))
        if not self._wake.wait(None if wait_s == math.inf else max(0.0, wait_s)) and due_s <= wait_s:
            with self._ending_on_error(idler):
                idler.take_idle_turn()

    def _work_wait_s(self, *, is_quiet: bool) -> float:
        """Return the seconds until a piece of work may run; infinite where there is none."""
        if not self._work:
            return math.inf
        if is_quiet:
            return min(self._work_due_at, self._batch_at + QUIET_S) - self._clock()
        _, _, submitted_at = self._work[0]
        return max(self._work_due_at, submitted_at) + GAP_S - self._clock()

    def _do_work(self) -> None:
        function, done, _ = self._work.popleft()
        if not done.set_running_or_notify_cancel():
            return
        began_at = self._clock()
        self._working = began_at, WORK_S
        try:
            result = function()
        except Exception as error:  # the caller that submitted the work gets it
            done.set_exception(error)
        else:
            done.set_result(result)
        finally:
            self._working = None
            now = self._clock()
            self._work_due_at = now + (now - began_at) * (1 / WORK_SHARE - 1)


def _tell_freed(served: Sequence[EngineUser]) -> None:
    for each in served:
        each.engine_freed()
