"""Several servers behind one port, each a process on cores of its own. Starts, replaces and stops them; serves nothing.

A worker that has cores to itself is a whole server: its engine's threads, its profile, its monitor and its waiting line
know of those cores alone, and what the other workers do is none of its business. The kernel hands each new connection
to a worker that waits for one, which a worker does once it is ready. Counts are summed over the workers by
prometheus_client, in files of a shared folder.
"""

import itertools
import logging
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from service.metrics import SHARED_FOLDER_VARIABLE, forget_worker

logger = logging.getLogger(__name__)

BACKLOG = 2048  # connections that the kernel keeps for workers that are busy; uvicorn's own default
WATCH_INTERVAL_S = 0.2
REPLACEMENT_INTERVAL_S = 10.0  # a worker is started no more often than that, however it ends
# How the command ends where it knows what is wrong, and that it will be wrong again.
KNOWN_FAILURES = (1, 2)


def split_cpus(cpus: Sequence[int], workers: int) -> list[set[int]]:
    """Divide CPU numbers into as many shares of neighbours, whose sizes differ by one at most.

    Raises:
        ValueError: there are more workers than CPUs.
    """
    if workers > len(cpus):
        raise ValueError(f"{workers} workers need a core each, and there are {len(cpus)}")
    ends = [len(cpus) * number // workers for number in range(workers + 1)]
    return [set(sorted(cpus)[start:end]) for start, end in itertools.pairwise(ends)]


def listen(host: str, port: int) -> socket.socket:
    """Open the socket that the workers share.

    Raises:
        OSError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.create_server((host, port), family=family, backlog=BACKLOG)
    opened.set_inheritable(True)
    return opened


class Supervisor:
    """Keeps a worker running on every share of the cores."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        shares: Sequence[set[int]],
        opened: socket.socket,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take what to run where.

        Args:
            command: serves on the socket that it inherits.
            environment: of the workers, but for the folder of their counts.
            shares: CPU numbers, a set for each worker.
            opened: the listening socket, inheritable.
            clock: monotonic, in seconds.
        """
        self._command, self._environment, self._shares = command, environment, shares
        self._socket, self._clock = opened, clock
        self._stopping = threading.Event()

    def stop(self, *_: object) -> None:
        """Let `run` end: a signal handler."""
        self._stopping.set()

    def run(self) -> bool:
        """Run the workers until told to stop, replacing those that crash; return whether they could be run at all."""
        with tempfile.TemporaryDirectory(prefix="supervit-metrics-") as folder:
            running = [self._start(share, folder) for share in self._shares]
            started_at = [self._clock()] * len(running)
            while not self._stopping.wait(WATCH_INTERVAL_S):
                for index, process in enumerate(running):
                    status = process.poll()
                    if status in KNOWN_FAILURES:
                        self._end(running)
                        return False
                    if status is not None and self._clock() - started_at[index] >= REPLACEMENT_INTERVAL_S:
                        logger.error("worker %d ended with status %d; replacing it", process.pid, status)
                        forget_worker(process.pid, folder)
                        running[index], started_at[index] = self._start(self._shares[index], folder), self._clock()
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
            )
        finally:
            os.sched_setaffinity(0, everywhere)
        logger.info("worker %d runs on CPUs %s", process.pid, ", ".join(map(str, sorted(share))))
        return process

    def _end(self, processes: Sequence["subprocess.Popen[bytes]"]) -> None:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
