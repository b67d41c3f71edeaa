import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from service.errors import CommandError
from service.hosting.supervisor import Supervisor, WorkerTiming
from service.hosting.workers import bind, inherit_socket, split_cpus, start_worker, write_heartbeat

LIMIT_S = 60.0  # bound on waits for events that happen at once on an idle machine
# Listens, reports its process ID, its CPUs and its metrics folder, and answers each connection with its process ID.
WORKER = """
import json, os, signal, socket, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
listening = socket.socket(fileno=int(sys.argv[2]))
listening.listen()
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as told:
    report = {"pid": os.getpid(), "cpus": sorted(os.sched_getaffinity(0))}
    told.sendall(json.dumps({**report, "folder": os.environ["PROMETHEUS_MULTIPROC_DIR"]}).encode())
while True:
    connection, _ = listening.accept()
    connection.sendall(str(os.getpid()).encode())
    connection.close()
"""
BEATING = """
import os, threading, time
from service.hosting.workers import write_heartbeat
def pulse():
    while True:
        write_heartbeat(os.environ["PROMETHEUS_MULTIPROC_DIR"], True)
        time.sleep(0.02)
threading.Thread(target=pulse, daemon=True).start()
"""


def test_cpus_are_split_as_evenly_as_possible(tmp_path: Path) -> None:
    assert split_cpus([0, 1, 2, 3], 4, 2, tmp_path) == [{0, 1}, {2, 3}]
    assert split_cpus([7, 3, 5, 4, 8], 5, 2, tmp_path) == [{3, 4}, {5, 7, 8}]
    assert split_cpus([0, 1, 2], 3, 3, tmp_path) == [{0}, {1}, {2}]
    assert split_cpus({4}, 1, 1, tmp_path) == [{4}]


def test_physical_cores_and_sockets_are_not_split_between_workers(tmp_path: Path) -> None:
    for cpu in range(8):  # two sockets of two cores of two threads, numbered as Linux does
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{cpu % 4 // 2}\n")
        (topology / "core_id").write_text(f"{cpu % 2}\n")
    assert split_cpus(range(8), 8, 2, tmp_path) == [{0, 4, 1, 5}, {2, 6, 3, 7}]
    assert split_cpus(range(8), 8, 4, tmp_path) == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]


def test_every_worker_gets_all_cpus_under_a_quota(tmp_path: Path) -> None:
    """The kernel chooses the CPUs: containers that chose for themselves would all choose the same ones."""
    assert split_cpus(range(64), 4.5, 2, tmp_path) == [set(range(64))] * 2


def test_more_workers_than_cores_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers must be at most 2, the number of cores, not 3"):
        split_cpus([0, 1], 2, 3, tmp_path)
    with pytest.raises(ValueError, match="workers must be at most 1, the number of cores, not 2"):
        split_cpus([0, 1], 0.5, 2, tmp_path)


@pytest.fixture
def opened() -> Iterator[socket.socket]:
    with bind("127.0.0.1", 0, is_shared=True) as opened:
        yield opened


class Reports:
    """A socket on which workers report that they listen."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self.port: int = listening.getsockname()[1]

    def next(self) -> dict[str, Any]:
        """Wait for the report of the next worker."""
        connection, _ = self._listening.accept()
        with connection, connection.makefile() as words:
            told: dict[str, Any] = json.load(words)
        return told


@pytest.fixture
def reports() -> Iterator[Reports]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(LIMIT_S)
        yield Reports(listening)


@pytest.fixture
def supervise(
    opened: socket.socket, reports: Reports
) -> Iterator[Callable[..., tuple[Supervisor, Callable[[], bool]]]]:
    """Start supervisors, each in a thread and with a function that waits for its end; stop all after the test."""
    started: list[tuple[Supervisor, threading.Thread]] = []
    timing = WorkerTiming(watch_interval_s=0.02, replacement_interval_s=0.0, silence_s=2.0)

    def supervise(
        script: str, count: int = 1, forget: Callable[[int, str], None] = lambda *_: None
    ) -> tuple[Supervisor, Callable[[], bool]]:
        cpus = sorted(os.sched_getaffinity(0))
        start = partial(start_worker, [sys.executable, "-c", script, str(reports.port)], os.environ, opened)
        supervisor = Supervisor(start, [{cpus[index % len(cpus)]} for index in range(count)], 5.0, timing, forget)
        could_run = list[bool]()
        thread = threading.Thread(target=lambda: could_run.append(supervisor.run()))
        thread.start()
        started.append((supervisor, thread))

        def wait() -> bool:
            thread.join(LIMIT_S)
            return could_run[0]

        return supervisor, wait

    yield supervise
    for supervisor, thread in started:
        supervisor.stop()
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def ask(opened: socket.socket) -> int:
    """Connect to some worker; return its process ID."""
    with socket.create_connection(opened.getsockname(), timeout=LIMIT_S) as connection:
        return int(connection.recv(100))


@contextmanager
def ending(pid: int) -> Iterator[None]:
    """Wait at the end of the block until a process has ended, which may be a child of another process."""
    handle = os.pidfd_open(pid)
    try:
        yield
        assert select.select([handle], [], [], LIMIT_S)[0], f"{pid} still runs"
    finally:
        os.close(handle)


def test_workers_share_an_address_and_a_folder_and_run_on_their_own_cores(
    opened: socket.socket, reports: Reports, supervise: Callable[..., tuple[Supervisor, Callable[[], bool]]]
) -> None:
    before = os.sched_getaffinity(0)
    supervisor, wait = supervise(WORKER, 2)
    told = [reports.next() for _ in range(2)]
    assert sorted(cpu for each in told for cpu in each["cpus"]) == sorted(
        sorted(before)[index % len(before)] for index in range(2)
    )
    (folder,) = {each["folder"] for each in told}
    assert Path(folder).is_dir()
    assert ask(opened) in {each["pid"] for each in told}
    assert os.sched_getaffinity(0) == before
    supervisor.stop()
    assert wait()
    assert not Path(folder).exists()


def test_connections_are_distributed_over_all_workers(
    opened: socket.socket, reports: Reports, supervise: Callable[..., tuple[Supervisor, Callable[[], bool]]]
) -> None:
    supervise(WORKER, 2)
    workers = {reports.next()["pid"] for _ in range(2)}
    answers = [ask(opened) for _ in range(200)]
    assert set(answers) == workers
    assert min(answers.count(worker) for worker in workers) > 60  # fails by chance once in 10^8 runs


def test_clients_are_refused_until_a_worker_listens(
    opened: socket.socket, reports: Reports, supervise: Callable[..., tuple[Supervisor, Callable[[], bool]]]
) -> None:
    supervise(WORKER.replace("listening.listen()", "").replace("while True:", "while signal.pause():"))
    reports.next()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(opened.getsockname(), timeout=LIMIT_S)


def test_a_worker_that_hangs_is_replaced(
    opened: socket.socket, reports: Reports, supervise: Callable[..., tuple[Supervisor, Callable[[], bool]]]
) -> None:
    supervise(BEATING + WORKER)
    first = reports.next()["pid"]
    assert ask(opened) == first
    with ending(first):
        os.kill(first, signal.SIGSTOP)
    second = reports.next()["pid"]
    assert second != first
    assert ask(opened) == second


def test_a_killed_worker_is_replaced_and_its_gauges_are_removed(
    opened: socket.socket, reports: Reports, supervise: Callable[..., tuple[Supervisor, Callable[[], bool]]]
) -> None:
    forgotten: list[int] = []
    supervise(WORKER, forget=lambda pid, _: forgotten.append(pid))
    first = reports.next()["pid"]
    os.kill(first, signal.SIGKILL)
    second = reports.next()["pid"]
    assert forgotten == [first]
    assert ask(opened) == second != first


def test_a_descriptor_that_is_no_socket_is_named() -> None:
    with pytest.raises(CommandError, match="--fd 9999 is no open socket"):
        inherit_socket(9999)


def test_an_address_in_use_is_rejected() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(OSError, match="in use"):
            bind(*first.getsockname())


def test_a_heartbeat_that_cannot_be_written_is_logged_and_not_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_heartbeat(str(tmp_path / "cleaned away"), True)
    assert "failed to send a heartbeat to the supervisor" in caplog.text


def test_workers_end_when_their_supervisor_is_killed(tmp_path: Path, reports: Reports) -> None:
    script = f"""
import os, sys
from functools import partial
from service.hosting.supervisor import Supervisor
from service.hosting.workers import bind, start_worker
opened = bind("127.0.0.1", 0, is_shared=True)
command = [sys.executable, "-c", {WORKER!r}, "{reports.port}"]
Supervisor(partial(start_worker, command, os.environ, opened), [os.sched_getaffinity(0)], 5.0).run()
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed parent leaves its folder behind
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as parent, ending(reports.next()["pid"]):
        parent.kill()
