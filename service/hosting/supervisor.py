"""Keeps one worker running on each share of the cores. Decides when to replace one and when to give up; starts none."""

import logging
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from service.hosting.workers import SERVING, heartbeat_file
from service.telemetry.multiprocess import forget_worker

logger = logging.getLogger(__name__)

# Exit statuses of the command for known errors. Until some worker has served, such an error is taken to affect all
# workers and ends them; later, it counts as a crash of the one worker.
KNOWN_FAILURES = (1, 2)


class Process(Protocol):
    """What a supervisor uses of a worker's `subprocess.Popen`."""

    @property
    def pid(self) -> int:
        """The process ID."""

    def poll(self) -> int | None:
        """Return the exit status, or None while the process runs."""

    def terminate(self) -> None:
        """Ask the process to stop."""

    def kill(self) -> None:
        """Kill the process."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process has ended.

        Raises:
            subprocess.TimeoutExpired: the process still runs after `timeout` seconds.
        """


@dataclass(frozen=True, slots=True)
class WorkerTiming:
    """Intervals and time limits of a supervisor.

    Attributes:
        watch_interval_s: time between two checks of the workers.
        replacement_interval_s: least time between two starts on the same share, however the first worker ends.
        silence_s: time without a heartbeat after which a worker counts as hung.
        start_s: time allowed until the first heartbeat of a worker.
        kill_margin_s: time beyond `drain_s`, in which a worker answers what it has admitted, until it is killed.
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
    # Counted, not timed: after the whole machine has been suspended, the supervisor may be the first to wake.
    silent_looks: int = 0


class Supervisor:
    """Keeps one worker running on each share of the cores."""

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
        """Create a supervisor, which starts nothing before `run`.

        Args:
            start: starts a worker on a share, with a folder for its metrics and heartbeats.
            shares: CPU numbers, one set for each worker.
            drain_s: longest time that a worker takes to stop.
            timing: intervals and time limits.
            forget: removes the gauges of a worker that has ended, by its process ID, from the metrics in a folder.
            clock: monotonic seconds.
            sleep: waits for so many seconds.
        """
        self._start, self._shares, self._drain_s = start, shares, drain_s
        self._timing, self._forget, self._clock, self._sleep = timing, forget, clock, sleep
        self.stopped_by: int | None = None

    def stop(self, number: int = signal.SIGTERM, _: object = None) -> None:
        """Make `run` end; this is a signal handler, and so no more than an assignment."""
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
        """Check the heartbeats of a worker, and kill the worker if they have ceased."""
        pulse = heartbeat_file(folder, worker.process.pid)
        last_beat_ns = pulse.stat().st_mtime_ns if pulse.exists() else 0
        worker.silent_looks = worker.silent_looks + 1 if last_beat_ns == worker.last_beat_ns else 0
        if last_beat_ns > worker.last_beat_ns:
            worker.has_served |= pulse.read_text() == SERVING
        worker.last_beat_ns = last_beat_ns
        limit_s = self._timing.silence_s if last_beat_ns else self._timing.start_s
        if worker.silent_looks * self._timing.watch_interval_s > limit_s:
            logger.error("worker %d hangs; killing it", worker.process.pid)
            worker.process.kill()
            worker.process.wait()

    def _replace(self, worker: _Worker, status: int, folder: str) -> None:
        self._forget(worker.process.pid, folder)
        heartbeat_file(folder, worker.process.pid).unlink(missing_ok=True)  # another process may get the same ID
        now = self._clock()
        if now - worker.started_at < self._timing.replacement_interval_s:
            return
        logger.error("worker %d ended with status %d; replacing it", worker.process.pid, status)
        worker.started_at, worker.last_beat_ns, worker.silent_looks = now, 0, 0
        try:
            worker.process = self._start(worker.share, folder)
        except OSError as error:  # the others continue, and this start is retried
            logger.error("failed to start a worker: %s", error)

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
