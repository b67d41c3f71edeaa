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

from service.hosting.supervisor import Supervisor, WorkerTiming
from service.hosting.workers import bind, split_cpus, start_worker, write_heartbeat

LIMIT_S = 60.0  # for what happens at once on an idle machine
# Listens, reports its number, which CPUs it may use and where its counts go; answers each connection with its number.
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


def test_cpus_are_shared_out_as_evenly_as_can_be(tmp_path: Path) -> None:
    assert split_cpus([0, 1, 2, 3], 4, 2, tmp_path) == [{0, 1}, {2, 3}]
    assert split_cpus([7, 3, 5, 4, 8], 5, 2, tmp_path) == [{3, 4}, {5, 7, 8}]
    assert split_cpus([0, 1, 2], 3, 3, tmp_path) == [{0}, {1}, {2}]
    assert split_cpus({4}, 1, 1, tmp_path) == [{4}]


def test_a_physical_core_and_a_socket_are_not_divided(tmp_path: Path) -> None:
    for cpu in range(8):  # two sockets of two cores of two threads, numbered as Linux does
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{cpu % 4 // 2}\n")
        (topology / "core_id").write_text(f"{cpu % 2}\n")
    assert split_cpus(range(8), 8, 2, tmp_path) == [{0, 4, 1, 5}, {2, 6, 3, 7}]
    assert split_cpus(range(8), 8, 4, tmp_path) == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]


def test_no_more_cpus_are_used_than_a_quota_grants(tmp_path: Path) -> None:
    """Which ones is up to the kernel: other containers would take the very same."""
    assert split_cpus(range(64), 4.5, 2, tmp_path) == [set(range(64))] * 2


def test_a_worker_without_a_core_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers must be at most 2, the number of cores, not 3"):
        split_cpus([0, 1], 2, 3, tmp_path)
    with pytest.raises(ValueError, match="workers must be at most 1, the number of cores, not 2"):
        split_cpus([0, 1], 0.5, 2, tmp_path)


@pytest.fixture
def opened() -> Iterator[socket.socket]:
    with bind("127.0.0.1", 0, is_shared=True) as opened:
        yield opened


class Reports:
    """Where workers say that they listen."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self.port: int = listening.getsockname()[1]

    def next(self) -> dict[str, Any]:
        """Wait for the next worker."""
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
    """Start supervisors in threads of their own, each with a function that waits for its end; stop them in the end."""
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
    """Connect to some worker; return its process number."""
    with socket.create_connection(opened.getsockname(), timeout=LIMIT_S) as connection:
        return int(connection.recv(100))


@contextmanager
def ending(pid: int) -> Iterator[None]:
    """Wait at last for the end of a process, which may be a child of another."""
    handle = os.pidfd_open(pid)
    try:
        yield
        assert select.select([handle], [], [], LIMIT_S)[0], f"{pid} still runs"
    finally:
        os.close(handle)


def test_workers_share_the_address_and_a_folder_and_have_cores_of_their_own(
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


def test_connections_are_dealt_out_to_all_workers(
    opened: socket.socket, reports: Reports, supervise: Callable[..., tuple[Supervisor, Callable[[], bool]]]
) -> None:
    supervise(WORKER, 2)
    workers = {reports.next()["pid"] for _ in range(2)}
    answers = [ask(opened) for _ in range(200)]
    assert set(answers) == workers
    assert min(answers.count(worker) for worker in workers) > 60  # by chance alone, once in 10^8 it is not


def test_no_client_is_kept_waiting_before_a_worker_listens(
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


def test_a_worker_that_is_killed_is_replaced_and_forgotten(
    opened: socket.socket, reports: Reports, supervise: Callable[..., tuple[Supervisor, Callable[[], bool]]]
) -> None:
    forgotten: list[int] = []
    supervise(WORKER, forget=lambda pid, _: forgotten.append(pid))
    first = reports.next()["pid"]
    os.kill(first, signal.SIGKILL)
    second = reports.next()["pid"]
    assert forgotten == [first]
    assert ask(opened) == second != first


def test_an_address_that_is_taken_is_rejected() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(OSError, match="in use"):
            bind(*first.getsockname())


def test_a_beat_that_cannot_be_written_is_no_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_heartbeat(str(tmp_path / "cleaned away"), True)
    assert "failed to send a heartbeat to the supervisor" in caplog.text


def test_workers_end_with_their_parent_even_if_it_is_killed(tmp_path: Path, reports: Reports) -> None:
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
