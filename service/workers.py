"""Several servers behind one port, each a process on cores of its own. Starts, replaces and stops them; serves nothing.

A worker that has cores to itself is a whole server: its engine's threads, its profile, its monitor and its waiting line
know of those cores alone, and what the other workers do is none of its business. The kernel hands each new connection
to a worker that waits for one, which a worker does once it is ready. Counts are summed over the workers by
prometheus_client, in files of a shared folder.
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
from pathlib import Path

from service.shared_counts import SHARED_FOLDER_VARIABLE, forget_worker

logger = logging.getLogger(__name__)

BACKLOG = 2048  # connections that the kernel keeps for workers that are busy; uvicorn's own default
WATCH_INTERVAL_S = 0.2
REPLACEMENT_INTERVAL_S = 10.0  # a worker is started no more often than that, however it ends
# How the command ends of what it knows to be wrong. Until some worker has run for so long, it is taken to be wrong with
# all of them; later, for a mishap.
KNOWN_FAILURES = (1, 2)
PROVEN_S = 60.0
KILL_MARGIN_S = 5.0  # beyond the time that a worker has to answer those that it has admitted
PR_SET_PDEATHSIG = 1  # of prctl(2)
_LIBRARY = ctypes.CDLL(None)


def split_cpus(cpus: Collection[int], cores: float, workers: int, root: Path = Path("/")) -> list[set[int]]:
    """Divide CPUs into as many shares, whose sizes differ by one at most; hyperthreads of a core stay side by side.

    Args:
        cpus: their numbers.
        cores: how many of them a quota lets this process use; the others are left out.
        workers: how many shares.
        root: holds sys/.

    Raises:
        ValueError: there are more workers than cores.
    """
    usable = sorted(cpus, key=lambda cpu: (_place(cpu, root), cpu))[: max(1, int(cores))]
    if workers > len(usable):
        raise ValueError(f"{workers} workers need a core each, and there are {len(usable)}")
    ends = [len(usable) * number // workers for number in range(workers + 1)]
    return [set(usable[start:end]) for start, end in itertools.pairwise(ends)]


def _place(cpu: int, root: Path) -> tuple[int, int]:
    """Tell on which socket and physical core a CPU is: hyperthreads of one core have numbers far apart."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    try:
        return int((topology / "physical_package_id").read_text()), int((topology / "core_id").read_text())
    except (OSError, ValueError):  # not every kernel tells
        return 0, cpu


def listen(host: str, port: int) -> socket.socket:
    """Open the socket that the workers share.

    Raises:
        OSError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


class Supervisor:
    """Keeps a worker running on every share of the cores."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        shares: Sequence[set[int]],
        opened: socket.socket,
        drain_s: float,
    ) -> None:
        """Take what to run where.

        Args:
            command: serves on the socket that it inherits.
            environment: of the workers, but for the folder of their counts.
            shares: CPU numbers, a set for each worker.
            opened: the listening socket; closed in the end.
            drain_s: longest time that a worker takes to stop.
        """
        self._command, self._environment, self._shares = command, environment, shares
        self._socket, self._drain_s = opened, drain_s
        self._is_stopping = False

    def stop(self, *_: object) -> None:
        """Let `run` end: a signal handler, and so no more than an assignment."""
        self._is_stopping = True

    def run(self) -> bool:
        """Run the workers until told to stop, replacing those that crash; return whether they could be run at all."""
        running: list[subprocess.Popen[bytes]] = []
        began_at = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="supervit-metrics-") as folder:
            try:
                running.extend(self._start(share, folder) for share in self._shares)
                started_at = [began_at] * len(running)
                while not self._is_stopping:
                    time.sleep(WATCH_INTERVAL_S)
                    now = time.monotonic()
                    for index, process in enumerate(running):
                        status = process.poll()
                        if status is None:
                            continue
                        if status in KNOWN_FAILURES and now - began_at < PROVEN_S:
                            return False
                        forget_worker(process.pid, folder)
                        if now - started_at[index] >= REPLACEMENT_INTERVAL_S:
                            logger.error("worker %d ended with status %d; replacing it", process.pid, status)
                            started_at[index] = now
                            try:
                                running[index] = self._start(self._shares[index], folder)
                            except OSError as error:  # the others go on, and this one is tried again
                                logger.error("no worker can be started: %s", error)
            finally:
                self._socket.close()  # or the kernel would go on taking connections that nobody answers
                self._end(running)
        return True

    def _start(self, share: set[int], folder: str) -> "subprocess.Popen[bytes]":
        everywhere = os.sched_getaffinity(0)
        os.sched_setaffinity(0, share)  # a child inherits it, from its very first instruction on
        try:
            process = subprocess.Popen(  # noqa: S603 - our own command
                self._command,
                env={**self._environment, SHARED_FOLDER_VARIABLE: folder},
                pass_fds=[self._socket.fileno()],
                preexec_fn=_end_with_parent,  # safe: this process has one thread
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


def _end_with_parent() -> None:
    """Have the kernel tell this process to stop once its parent has ended, even of a SIGKILL."""
    _LIBRARY.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
