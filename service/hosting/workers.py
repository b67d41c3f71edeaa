"""Several servers behind one port, each a process on cores of its own: shares cores out, starts and hears one of them.

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
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from service.errors import CommandError
from service.telemetry.multiprocess import SHARED_FOLDER_VARIABLE

logger = logging.getLogger(__name__)

SERVING, PREPARING = "serving", "preparing"  # what a worker says with a beat
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


def take_address(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """Take an address; one that is shared is so among our own workers, not with those of another server.

    Raises:
        CommandError: it cannot be had.
    """
    try:
        if is_shared:
            bind(host, port).close()
        return bind(host, port, is_shared=is_shared)
    except OSError as error:
        raise CommandError(f"{host} port {port} cannot be listened on: {error.strerror}") from error


def beat(folder: str, is_serving: bool) -> None:
    """Tell the supervisor that this worker still gets to do things, and what it does."""
    try:
        pulse_file(folder, os.getpid()).write_text(SERVING if is_serving else PREPARING)
    except OSError as error:  # not worth a server
        logger.warning("the supervisor cannot be told that all is well: %s", error)


def pulse_file(folder: str, pid: int) -> Path:
    """Name the file that a worker writes at every beat."""
    return Path(folder, f"{pid}.pulse")


def start_worker(
    command: Sequence[str],
    environment: Mapping[str, str],
    reserved: socket.socket,
    share: set[int],
    folder: str,
) -> "subprocess.Popen[bytes]":
    """Start a worker on CPUs of its own, with a socket of its own at the common address.

    Args:
        command: serves on the inherited socket whose number is added to it.
        environment: of the worker, but for the folder of its counts.
        reserved: has the address, shared, and does not listen.
        share: the CPUs' numbers.
        folder: for its counts and its beats.

    Raises:
        OSError: it cannot be started.
    """
    everywhere = os.sched_getaffinity(0)
    with bind(*reserved.getsockname()[:2], is_shared=True) as opened:
        os.sched_setaffinity(0, share)  # a child inherits it, from its very first instruction on
        try:
            process = subprocess.Popen(  # noqa: S603 - our own command
                [*command, str(opened.fileno())],
                env={**environment, SHARED_FOLDER_VARIABLE: folder},
                pass_fds=[opened.fileno()],
                preexec_fn=partial(_end_with_parent, os.getpid()),  # safe: no other thread runs Python
            )
        finally:
            os.sched_setaffinity(0, everywhere)
    logger.info("worker %d runs on CPUs %s", process.pid, ", ".join(map(str, sorted(share))))
    return process


def _end_with_parent(parent: int) -> None:
    """Have the kernel tell this process to stop once its parent has ended, even of a SIGKILL."""
    _LIBRARY.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)
