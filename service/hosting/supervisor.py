"""Keeps a worker running on every share of the cores: when to replace one, when to give up. Told how to start one."""

import logging
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from service.hosting.workers import SERVING, pulse_file
from service.telemetry.multiprocess import forget_worker

logger = logging.getLogger(__name__)

# How the command ends of what it knows to be wrong. Until some worker has served, it is taken to be wrong with all of
# them; later, for a mishap.
KNOWN_FAILURES = (1, 2)


class Process(Protocol):
    """What a supervisor asks of a worker's process, as `subprocess.Popen` answers it."""

    @property
    def pid(self) -> int:
        """Its number."""

    def poll(self) -> int | None:
        """How it ended, or None while it runs."""

    def terminate(self) -> None:
        """Ask it to stop."""

    def kill(self) -> None:
        """Stop it."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it still runs after as many seconds.
        """


@dataclass(frozen=True, slots=True)
class WorkerTiming:
    """How long a supervisor waits for what.

    Attributes:
        watch_interval_s: between two looks at the workers.
        replacement_interval_s: least time between two starts of a worker, however it ends.
        silence_s: without a beat, a worker is taken to hang.
        start_s: until its first.
        kill_margin_s: beyond the time that a worker has to answer those that it has admitted.
    """

    watch_interval_s: float = 0.2
    replacement_interval_s: float = 10.0
    silence_s: float = 30.0
    start_s: float = 300.0
    kill_margin_s: float = 5.0


TIMING = WorkerTiming()


@dataclass(slots=True)
class _Worker:
    process: Process
    share: set[int]
    started_at: float
    last_beat_ns: int = 0
    has_served: bool = False
    # Counted, not timed: when the whole machine has been asleep, the supervisor may be the first to wake.
    silent_looks: int = 0


class Supervisor:
    """Keeps a worker running on every share of the cores."""

    def __init__(
        self,
        start: Callable[[set[int], str], Process],
        shares: Sequence[set[int]],
        drain_s: float,
        timing: WorkerTiming = TIMING,
        forget: Callable[[int, str], None] = forget_worker,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Take what to run where.

        Args:
            start: starts a worker on a share, with a folder for its counts and beats.
            shares: CPU numbers, a set for each worker.
            drain_s: longest time that a worker takes to stop.
            timing: how long to wait for what.
            forget: takes the number of a worker that has ended out of the counts in a folder.
            clock: monotonic seconds.
            sleep: lets seconds pass.
        """
        self._start, self._shares, self._drain_s = start, shares, drain_s
        self._timing, self._forget, self._clock, self._sleep = timing, forget, clock, sleep
        self.stopped_by: int | None = None

    def stop(self, number: int = signal.SIGTERM, _: object = None) -> None:
        """Let `run` end: a signal handler, and so no more than an assignment."""
        self.stopped_by = number

    def run(self) -> bool:
        """Run the workers until told to stop, replacing those that crash; return whether they could be run at all."""
        running: list[_Worker] = []
        with tempfile.TemporaryDirectory(prefix="supervit-metrics-") as folder:
            try:
                running.extend(_Worker(self._start(share, folder), share, self._clock()) for share in self._shares)
                while self.stopped_by is None:
                    self._sleep(self._timing.watch_interval_s)
                    for worker in running:
                        status = worker.process.poll()
                        if status is None:
                            self._look_at(worker, folder)
                        elif status in KNOWN_FAILURES and not any(each.has_served for each in running):
                            return False
                        else:
                            self._replace(worker, status, folder)
            finally:
                self._end([worker.process for worker in running])
        return True

    def _look_at(self, worker: _Worker, folder: str) -> None:
        """Take note of a worker's beats; kill it where they have ceased."""
        pulse = pulse_file(folder, worker.process.pid)
        last_beat_ns = pulse.stat().st_mtime_ns if pulse.exists() else 0
        worker.silent_looks = worker.silent_looks + 1 if last_beat_ns == worker.last_beat_ns else 0
        if last_beat_ns > worker.last_beat_ns:
            worker.has_served |= pulse.read_text() == SERVING
        worker.last_beat_ns = last_beat_ns
        patience_s = self._timing.silence_s if last_beat_ns else self._timing.start_s
        if worker.silent_looks * self._timing.watch_interval_s > patience_s:
            logger.error("worker %d hangs; killing it", worker.process.pid)
            worker.process.kill()
            worker.process.wait()

    def _replace(self, worker: _Worker, status: int, folder: str) -> None:
        self._forget(worker.process.pid, folder)
        pulse_file(folder, worker.process.pid).unlink(missing_ok=True)  # another process may get its number
        now = self._clock()
        if now - worker.started_at < self._timing.replacement_interval_s:
            return
        logger.error("worker %d ended with status %d; replacing it", worker.process.pid, status)
        worker.started_at, worker.last_beat_ns, worker.silent_looks = now, 0, 0
        try:
            worker.process = self._start(worker.share, folder)
        except OSError as error:  # the others go on, and this one is tried again
            logger.error("no worker can be started: %s", error)

    def _end(self, processes: Sequence[Process]) -> None:
        for process in processes:
            process.terminate()
        deadline = self._clock() + self._drain_s + self._timing.kill_margin_s
        for process in processes:
            try:
                process.wait(max(0.0, deadline - self._clock()))
            except subprocess.TimeoutExpired:
                logger.error("worker %d does not stop; killing it", process.pid)
                process.kill()
                process.wait()
