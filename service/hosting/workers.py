"""Several servers behind one port, each a process on cores of its own. Starts, replaces and stops them; serves nothing.

A worker that has cores to itself is a whole server: its engine's threads, its profile, its monitor and its queue
know of those cores alone, and what the other workers do is none of its business. Each listens on the port by itself,
once it is ready, and the kernel deals new connections out to those that do, by chance. Counts are summed over the
workers by prometheus_client, in files of a shared folder.
"""

import ctypes
import itertools
import logging
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from service.telemetry.multiprocess import SHARED_FOLDER_VARIABLE, forget_worker

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.2
REPLACEMENT_INTERVAL_S = 10.0  # a worker is started no more often than that, however it ends
# How the command ends of what it knows to be wrong. Until some worker has served, it is taken to be wrong with all of
# them; later, for a mishap.
KNOWN_FAILURES = (1, 2)
SILENCE_S = 30.0  # without a beat, a worker is taken to hang
START_S = 300.0  # until its first
SERVING, PREPARING = "serving", "preparing"  # what a worker says with a beat
KILL_MARGIN_S = 5.0  # beyond the time that a worker has to answer those that it has admitted
PR_SET_PDEATHSIG = 1  # of prctl(2)
_LIBRARY = ctypes.CDLL(None)


def split_cpus(cpus: Collection[int], cores: float, workers: int, root: Path = Path("/")) -> list[set[int]]:
    """Divide CPUs into as many shares, whose sizes differ by one at most; hyperthreads of a core stay side by side.

    Under a quota the process does not own its CPUs, and others divide the very same: each share is then all of them.

    Args:
        cpus: their numbers.
        cores: how many of them this process may keep busy: fewer under a quota.
        workers: how many shares.
        root: holds sys/.

    Raises:
        ValueError: there are more workers than cores.
    """
    usable = max(1, int(min(cores, len(cpus))))
    if workers > usable:
        raise ValueError(f"{workers} workers need a core each, and there are {usable}")
    if cores < len(cpus):
        return [set(cpus)] * workers
    in_order = sorted(cpus, key=lambda cpu: (_place(cpu, root), cpu))
    ends = [usable * number // workers for number in range(workers + 1)]
    return [set(in_order[start:end]) for start, end in itertools.pairwise(ends)]


def _place(cpu: int, root: Path) -> tuple[int, int]:
    """Tell on which socket and physical core a CPU is: hyperthreads of one core have numbers far apart."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    try:
        return int((topology / "physical_package_id").read_text()), int((topology / "core_id").read_text())
    except (OSError, ValueError):  # not every kernel tells
        return 0, cpu


def bind(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """Take an address, for a server that shall listen on it.

    Args:
        host: an address, or a name of one.
        port: 0 for any free one.
        is_shared: whether other sockets that say so may have the same address. Those that listen get connections.

    Raises:
        OSError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened.bind((host, port))
    except OSError:
        opened.close()
        raise
    return opened


def beat(folder: str, is_serving: bool) -> None:
    """Tell the supervisor that this worker still gets to do things, and what it does."""
    try:
        _pulse(folder, os.getpid()).write_text(SERVING if is_serving else PREPARING)
    except OSError as error:  # not worth a server
        logger.warning("the supervisor cannot be told that all is well: %s", error)


def _pulse(folder: str, pid: int) -> Path:
    return Path(folder, f"{pid}.pulse")


@dataclass(slots=True)
class _Worker:
    process: "subprocess.Popen[bytes]"
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
        command: Sequence[str],
        environment: Mapping[str, str],
        shares: Sequence[set[int]],
        reserved: socket.socket,
        drain_s: float,
    ) -> None:
        """Take what to run where.

        Args:
            command: serves on the inherited socket whose number is added to it.
            environment: of the workers, but for the folder of their counts.
            shares: CPU numbers, a set for each worker.
            reserved: has the address, shared, and does not listen.
            drain_s: longest time that a worker takes to stop.
        """
        self._command, self._environment, self._shares = command, environment, shares
        self._reserved, self._drain_s = reserved, drain_s
        self.stopped_by: int | None = None

    def stop(self, number: int = signal.SIGTERM, _: object = None) -> None:
        """Let `run` end: a signal handler, and so no more than an assignment."""
        self.stopped_by = number

    def run(self) -> bool:
        """Run the workers until told to stop, replacing those that crash; return whether they could be run at all."""
        running: list[_Worker] = []
        with tempfile.TemporaryDirectory(prefix="supervit-metrics-") as folder:
            try:
                running.extend(_Worker(self._start(share, folder), share, time.monotonic()) for share in self._shares)
                while self.stopped_by is None:
                    time.sleep(WATCH_INTERVAL_S)
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
        pulse = _pulse(folder, worker.process.pid)
        last_beat_ns = pulse.stat().st_mtime_ns if pulse.exists() else 0
        worker.silent_looks = worker.silent_looks + 1 if last_beat_ns == worker.last_beat_ns else 0
        if last_beat_ns > worker.last_beat_ns:
            worker.has_served |= pulse.read_text() == SERVING
        worker.last_beat_ns = last_beat_ns
        if worker.silent_looks * WATCH_INTERVAL_S > (SILENCE_S if last_beat_ns else START_S):
            logger.error("worker %d hangs; killing it", worker.process.pid)
            worker.process.kill()
            worker.process.wait()

    def _replace(self, worker: _Worker, status: int, folder: str) -> None:
        forget_worker(worker.process.pid, folder)
        _pulse(folder, worker.process.pid).unlink(missing_ok=True)  # another process may get its number
        now = time.monotonic()
        if now - worker.started_at < REPLACEMENT_INTERVAL_S:
            return
        logger.error("worker %d ended with status %d; replacing it", worker.process.pid, status)
        worker.started_at, worker.last_beat_ns, worker.silent_looks = now, 0, 0
        try:
            worker.process = self._start(worker.share, folder)
        except OSError as error:  # the others go on, and this one is tried again
            logger.error("no worker can be started: %s", error)

    def _start(self, share: set[int], folder: str) -> "subprocess.Popen[bytes]":
        everywhere = os.sched_getaffinity(0)
        with bind(*self._reserved.getsockname()[:2], is_shared=True) as opened:
            os.sched_setaffinity(0, share)  # a child inherits it, from its very first instruction on
            try:
                process = subprocess.Popen(  # noqa: S603 - our own command
                    [*self._command, str(opened.fileno())],
                    env={**self._environment, SHARED_FOLDER_VARIABLE: folder},
                    pass_fds=[opened.fileno()],
                    preexec_fn=partial(_end_with_parent, os.getpid()),  # safe: no other thread runs Python
                )
            finally:
                os.sched_setaffinity(0, everywhere)
        logger.info("worker %d runs on CPUs %s", process.pid, ", ".join(map(str, sorted(share))))
        return process

    def _end(self, processes: Sequence["subprocess.Popen[bytes]"]) -> None:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + self._drain_s + KILL_MARGIN_S
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.error("worker %d does not stop; killing it", process.pid)
                process.kill()
                process.wait()


def _end_with_parent(parent: int) -> None:
    """Have the kernel tell this process to stop once its parent has ended, even of a SIGKILL."""
    _LIBRARY.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)
