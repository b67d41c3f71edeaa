import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from service.hosting import workers
from service.hosting.workers import Supervisor, beat, bind, split_cpus

# Writes which CPUs it may use and where its counts go, listens, answers one connection after another with its number.
WORKER = """
import json, os, pathlib, signal, socket, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
told = {"cpus": sorted(os.sched_getaffinity(0)), "folder": os.environ["PROMETHEUS_MULTIPROC_DIR"]}
pathlib.Path(sys.argv[1], str(os.getpid())).write_text(json.dumps(told))
listening = socket.socket(fileno=int(sys.argv[2]))
listening.listen()
while True:
    connection, _ = listening.accept()
    connection.sendall(str(os.getpid()).encode())
    connection.close()
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
    with pytest.raises(ValueError, match="3 workers need a core each, and there are 2"):
        split_cpus([0, 1], 2, 3, tmp_path)
    with pytest.raises(ValueError, match="2 workers need a core each, and there are 1"):
        split_cpus([0, 1], 0.5, 2, tmp_path)


@pytest.fixture
def opened() -> Iterator[socket.socket]:
    with bind("127.0.0.1", 0, is_shared=True) as opened:
        yield opened


@pytest.fixture
def supervise(
    tmp_path: Path, opened: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Supervisor, threading.Thread, list[bool]]]]:
    """Start supervisors in threads of their own; stop them in the end."""
    monkeypatch.setattr(workers, "WATCH_INTERVAL_S", 0.02)
    started: list[tuple[Supervisor, threading.Thread]] = []

    def supervise(script: str, count: int = 1) -> tuple[Supervisor, threading.Thread, list[bool]]:
        command = [sys.executable, "-c", script, str(tmp_path)]
        cpus = sorted(os.sched_getaffinity(0))
        shares = [{cpus[index % len(cpus)]} for index in range(count)]
        environment: Mapping[str, str] = os.environ
        supervisor, ended = Supervisor(command, environment, shares, opened, 5.0), list[bool]()
        thread = threading.Thread(target=lambda: ended.append(supervisor.run()))
        thread.start()
        started.append((supervisor, thread))
        return supervisor, thread, ended

    yield supervise
    for supervisor, thread in started:
        supervisor.stop()
        thread.join(10)
        assert not thread.is_alive()


def who_answers(opened: socket.socket) -> int:
    """Connect until some worker listens; return its process number."""
    deadline = time.monotonic() + 20
    while True:
        try:
            with socket.create_connection(opened.getsockname(), timeout=10) as connection:
                return int(connection.recv(100))
        except (ConnectionError, ValueError):  # it left before it answered
            assert time.monotonic() < deadline
            time.sleep(0.01)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_workers_share_the_address_and_a_folder_and_have_cores_of_their_own(
    tmp_path: Path,
    opened: socket.socket,
    supervise: Callable[..., tuple[Supervisor, threading.Thread, list[bool]]],
) -> None:
    before = os.sched_getaffinity(0)
    supervisor, thread, ended = supervise(WORKER, 2)
    until(lambda: len([file for file in tmp_path.iterdir() if file.stat().st_size]) == 2)
    told = [eval(file.read_text()) for file in tmp_path.iterdir()]  # noqa: S307 - our own words
    assert sorted(cpu for each in told for cpu in each["cpus"]) == sorted(
        sorted(before)[index % len(before)] for index in range(2)
    )
    (folder,) = {each["folder"] for each in told}
    assert Path(folder).is_dir()
    assert str(who_answers(opened)) in {file.name for file in tmp_path.iterdir()}
    assert os.sched_getaffinity(0) == before
    supervisor.stop()
    thread.join(10)
    assert ended == [True]
    assert not Path(folder).exists()


def test_connections_are_dealt_out_to_all_workers(
    opened: socket.socket, supervise: Callable[..., tuple[Supervisor, threading.Thread, list[bool]]]
) -> None:
    supervise(WORKER, 2)
    until(lambda: len({who_answers(opened) for _ in range(8)}) == 2)  # both listen
    answers = [who_answers(opened) for _ in range(200)]
    assert min(answers.count(worker) for worker in set(answers)) > 60  # by chance alone, once in 10^8 it is not


def test_no_client_is_kept_waiting_before_a_worker_listens(
    opened: socket.socket, supervise: Callable[..., tuple[Supervisor, threading.Thread, list[bool]]]
) -> None:
    supervise("import time; time.sleep(20)")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(opened.getsockname(), timeout=10)


def test_a_worker_that_hangs_is_replaced(
    opened: socket.socket,
    supervise: Callable[..., tuple[Supervisor, threading.Thread, list[bool]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would go on getting its share of the connections."""
    monkeypatch.setattr(workers, "SILENCE_S", 0.5)
    monkeypatch.setattr(workers, "REPLACEMENT_INTERVAL_S", 0.0)
    monkeypatch.setattr(workers, "forget_worker", lambda *_: None)
    beating = """
import threading
from service.hosting.workers import beat
def pulse():
    while True:
        beat(os.environ["PROMETHEUS_MULTIPROC_DIR"], True)
        time.sleep(0.05)
threading.Thread(target=pulse, daemon=True).start()
"""
    supervise("import os, time\n" + beating + WORKER)
    first = who_answers(opened)
    time.sleep(1)
    assert who_answers(opened) == first
    os.kill(first, signal.SIGSTOP)
    until(lambda: not is_running(first))
    assert who_answers(opened) != first


def test_an_address_that_is_taken_is_rejected() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(OSError, match="in use"):
            bind(*first.getsockname())


def test_a_worker_that_is_killed_is_replaced_and_forgotten(
    opened: socket.socket,
    supervise: Callable[..., tuple[Supervisor, threading.Thread, list[bool]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forgotten: list[int] = []
    monkeypatch.setattr(workers, "REPLACEMENT_INTERVAL_S", 0.0)
    monkeypatch.setattr(workers, "forget_worker", lambda pid, _: forgotten.append(pid))
    supervise(WORKER)
    first = who_answers(opened)
    os.kill(first, signal.SIGKILL)
    until(lambda: forgotten == [first])
    assert who_answers(opened) != first


def test_a_worker_that_crashes_at_once_is_not_started_over_and_over(
    tmp_path: Path, supervise: Callable[..., tuple[Supervisor, threading.Thread, list[bool]]]
) -> None:
    crash = "import os, pathlib, sys; pathlib.Path(sys.argv[1], str(os.getpid())).touch(); os.kill(os.getpid(), 9)"
    supervise(crash)
    until(lambda: len(list(tmp_path.iterdir())) == 1)
    time.sleep(0.3)  # a dozen looks
    assert len(list(tmp_path.iterdir())) == 1


def test_such_a_failure_is_a_mishap_once_a_worker_has_served(
    tmp_path: Path,
    supervise: Callable[..., tuple[Supervisor, threading.Thread, list[bool]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "REPLACEMENT_INTERVAL_S", 0.0)
    monkeypatch.setattr(workers, "forget_worker", lambda *_: None)
    first_serves = """
import os, pathlib, sys, time
from service.hosting.workers import beat
folder = pathlib.Path(sys.argv[1])
folder.joinpath(str(os.getpid())).touch()
try:
    folder.joinpath("serves").touch(exist_ok=False)
except FileExistsError:
    time.sleep(0.5)
    sys.exit(1)
while True:
    beat(os.environ["PROMETHEUS_MULTIPROC_DIR"], True)
    time.sleep(0.05)
"""
    supervise(first_serves, 2)
    until(lambda: len(list(tmp_path.iterdir())) >= 5)


def test_a_worker_that_never_beats_is_killed(
    tmp_path: Path,
    supervise: Callable[..., tuple[Supervisor, threading.Thread, list[bool]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "START_S", 0.3)
    monkeypatch.setattr(workers, "REPLACEMENT_INTERVAL_S", 0.0)
    monkeypatch.setattr(workers, "forget_worker", lambda *_: None)
    stuck = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], str(os.getpid())).touch(); time.sleep(60)"
    supervise(stuck)
    until(lambda: len(list(tmp_path.iterdir())) >= 2)


def test_a_beat_that_cannot_be_written_is_no_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    beat(str(tmp_path / "cleaned away"), True)
    assert "the supervisor cannot be told" in caplog.text


def test_a_worker_that_cannot_be_started_is_tried_again_and_the_others_go_on(
    opened: socket.socket,
    supervise: Callable[..., tuple[Supervisor, threading.Thread, list[bool]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "REPLACEMENT_INTERVAL_S", 0.0)
    monkeypatch.setattr(workers, "forget_worker", lambda *_: None)
    start, failures = Supervisor._start, [OSError("no processes left")]

    def start_later(supervisor: Supervisor, share: set[int], folder: str) -> "subprocess.Popen[bytes]":
        if failures:
            raise failures.pop()
        return start(supervisor, share, folder)

    supervise(WORKER)
    first = who_answers(opened)
    monkeypatch.setattr(Supervisor, "_start", start_later)
    os.kill(first, signal.SIGKILL)
    assert who_answers(opened) != first
    assert not failures


def test_a_worker_that_does_not_stop_is_killed(
    opened: socket.socket,
    supervise: Callable[..., tuple[Supervisor, threading.Thread, list[bool]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "KILL_MARGIN_S", -4.9)
    supervisor, thread, ended = supervise(WORKER.replace("lambda *_: sys.exit(0)", "signal.SIG_IGN"))
    who_answers(opened)
    supervisor.stop()
    thread.join(10)
    assert ended == [True]


@pytest.mark.parametrize("status", [1, 2])
def test_a_failure_that_the_command_itself_tells_ends_everything(
    supervise: Callable[..., tuple[Supervisor, threading.Thread, list[bool]]], status: int
) -> None:
    _, thread, ended = supervise(f"import os, sys, time; sys.exit({status})", 2)
    thread.join(10)
    assert ended == [False]


def test_workers_end_with_their_parent_even_if_it_is_killed(tmp_path: Path) -> None:
    script = f"""
import os, sys
from service.hosting.workers import Supervisor, bind
opened = bind("127.0.0.1", 0, is_shared=True)
command = [sys.executable, "-c", {WORKER!r}, {str(tmp_path)!r}]
Supervisor(command, os.environ, [os.sched_getaffinity(0)], opened, 5.0).run()
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed parent leaves its folder behind
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as parent:
        until(lambda: any(path.name.isdigit() and path.stat().st_size for path in tmp_path.iterdir()))
        (worker,) = (int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())
        parent.kill()
    until(lambda: not is_running(worker))


def is_running(pid: int) -> bool:
    """Tell whether there is such a process; one that has ended and whom nobody has asked how is none."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
