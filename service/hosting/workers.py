"""Several servers behind one port, each a process on its own cores: divides cores, starts workers, sends heartbeats.

A worker with cores to itself is a whole server: its engine's threads, its profile, its monitor and its queue see those
cores alone, and it does not depend on the other workers. Each worker listens on the port itself once it is ready, and
the kernel distributes new connections at random over the workers that listen. prometheus_client sums the metrics over
the workers, in files of a shared folder.
"""

import ctypes
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from service.errors import CommandError
from service.telemetry.multiprocess import SHARED_FOLDER_VARIABLE

logger = logging.getLogger(__name__)

SERVING, PREPARING = "serving", "preparing"  # contents of a worker's heartbeat file
PR_SET_PDEATHSIG = 1  # of prctl(2)
_LIBRARY = ctypes.CDLL(None)


def split_cpus(cpus: Collection[int], cores: float, workers: int, root: Path = Path("/")) -> list[set[int]]:
    """Divide CPUs into one share per worker; sizes differ by at most one, and hyperthreads of a core stay side by side.

    Under a quota, the process does not own its CPUs but shares them with others: each share is then all of them.

    Args:
        cpus: numbers of the CPUs.
        cores: how many of them this process may keep busy: fewer under a quota.
        workers: number of shares.
        root: folder that holds sys/.

    Raises:
        ValueError: there are more workers than cores.
    """
    usable = max(1, int(min(cores, len(cpus))))
    if workers > usable:
        raise ValueError(f"workers must be at most {usable}, the number of cores, not {workers}")
    if cores < len(cpus):
        return [set(cpus)] * workers
    in_order = sorted(cpus, key=lambda cpu: (_place(cpu, root), cpu))
    ends = [usable * number // workers for number in range(workers + 1)]
    return [set(in_order[start:end]) for start, end in itertools.pairwise(ends)]


def _place(cpu: int, root: Path) -> tuple[int, int]:
    """Return the socket and the physical core of a CPU: hyperthreads of one core have numbers far apart."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    try:
        return int((topology / "physical_package_id").read_text()), int((topology / "core_id").read_text())
    except (OSError, ValueError):  # not every kernel provides them
        return 0, cpu


def bind(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """Bind a socket to an address, for a server to listen on.

    Args:
        host: an IP address or a host name.
        port: 0 for any free one.
        is_shared: whether other shared sockets may have the same address (SO_REUSEPORT).
            Those that listen get connections.

    Raises:
        OSError: the address is not available.
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


def inherit_socket(descriptor: int) -> socket.socket:
    """Return the socket that another process has opened for this one.

    Raises:
        CommandError: there is no such socket.
    """
    try:
        return socket.socket(fileno=descriptor)
    except OSError as error:
        raise CommandError(f"--fd {descriptor} is no open socket: {error.strerror}") from error


def bind_exclusively(host: str, port: int) -> socket.socket:
    """Bind a socket to an address.

    Raises:
        CommandError: the address is not available.
    """
    try:
        return bind(host, port)
    except OSError as error:
        raise CommandError(f"cannot listen on {host} port {port}: {error.strerror}") from error


@contextmanager
def reserved(host: str, port: int) -> Iterator[socket.socket]:
    """Reserve an address until the block ends, for sockets of our own workers and not of another server.

    Yields:
        A socket with the address, which does not listen. Sockets of another server could share its address as those of
        our workers do, so a name that only one process can bind stands for the address.

    Raises:
        CommandError: the address is not available.
    """
    bind_exclusively(host, port).close()
    with bind(host, port, is_shared=True) as opened, socket.socket(socket.AF_UNIX) as claim:
        number = opened.getsockname()[1]
        try:
            if sys.platform == "linux":  # elsewhere names have files, which would survive the process
                claim.bind(f"\0supervit {host} {number}")
        except OSError as error:
            raise CommandError(f"cannot listen on {host} port {number}: {error.strerror}") from error
        yield opened


def write_heartbeat(folder: str, is_serving: bool) -> None:
    """Send a heartbeat to the supervisor: this worker makes progress, and serves or prepares."""
    try:
        heartbeat_file(folder, os.getpid()).write_text(SERVING if is_serving else PREPARING)
    except OSError as error:  # no reason to end a server
        logger.warning("failed to send a heartbeat to the supervisor: %s", error)


def heartbeat_file(folder: str, pid: int) -> Path:
    """Return the path of a worker's heartbeat file."""
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
        command: serves on an inherited socket, whose file descriptor is appended to the command.
        environment: variables of the worker, without the folder of its metrics.
        reserved: a shared socket that holds the address and does not listen.
        share: numbers of the worker's CPUs.
        folder: holds the metrics and heartbeats of the workers.

    Raises:
        OSError: the worker cannot be started.
    """
    everywhere = os.sched_getaffinity(0)
    with bind(*reserved.getsockname()[:2], is_shared=True) as opened:
        os.sched_setaffinity(0, share)  # the child inherits it from its first instruction
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
    """Have the kernel send SIGTERM to this process once its parent has ended, even by SIGKILL."""
    _LIBRARY.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent ended before the kernel was told
        os._exit(1)
