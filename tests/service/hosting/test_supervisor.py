import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from service.hosting.supervisor import Supervisor, WorkerTiming
from service.hosting.workers import PREPARING, SERVING, heartbeat_file

DRAIN_S = 8.0
TIMING = WorkerTiming(
    watch_interval_s=1.0, replacement_interval_s=10.0, silence_s=20.0, start_s=60.0, kill_margin_s=5.0
)


class Worker:
    """A process in virtual time. Unless a test says otherwise, it sends heartbeats, and ends when it is terminated."""

    def __init__(self, machine: "Machine", pid: int) -> None:
        self.machine, self.pid, self.started_at = machine, pid, machine.now
        self.status: int | None = None
        self.says: str | None = SERVING
        self.is_deaf = False
        self.killed_at: float | None = None

    def poll(self) -> int | None:
        return self.status

    def terminate(self) -> None:
        if not self.is_deaf and self.status is None:
            self.status = 0

    def kill(self) -> None:
        self.status, self.killed_at = -9, self.machine.now

    def wait(self, timeout: float | None = None) -> int:
        if self.status is None:
            assert timeout is not None, "would wait forever"
            self.machine.now += timeout
            raise subprocess.TimeoutExpired("worker", timeout)
        return self.status


class Machine:
    """A supervisor and its workers in virtual time; planned events happen before the check at their time."""

    def __init__(self, count: int = 1, **as_started: object) -> None:
        self.now = 0.0
        self.as_started = as_started
        self.workers: list[Worker] = []
        self.forgotten: list[int] = []
        self.refusals: list[OSError] = []
        self.folder = ""
        self._plan: list[tuple[float, Callable[[], object]]] = []
        self.supervisor = Supervisor(
            self.start,
            [{number} for number in range(count)],
            DRAIN_S,
            TIMING,
            forget=lambda pid, _: self.forgotten.append(pid),
            clock=lambda: self.now,
            sleep=self.sleep,
        )

    def start(self, share: set[int], folder: str) -> Worker:
        del share
        self.folder = folder
        if self.refusals:
            raise self.refusals.pop()
        worker = Worker(self, pid=100 + len(self.workers))
        for name, value in self.as_started.items():
            setattr(worker, name, value)
        self.workers.append(worker)
        return worker

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for due in [each for each in self._plan if each[0] <= self.now]:
            self._plan.remove(due)
            due[1]()
        for worker in self.workers:
            if worker.status is None and worker.says is not None:
                pulse = heartbeat_file(self.folder, worker.pid)
                pulse.write_text(worker.says)
                os.utime(pulse, ns=(int(self.now * 1e9), int(self.now * 1e9)))

    def at(self, seconds: float, act: Callable[[], object]) -> None:
        """Plan to call `act` at a time."""
        self._plan.append((seconds, act))

    def end(self, index: int, status: int) -> None:
        """End the worker that was started as number `index`, counted from 0."""
        self.workers[index].status = status

    def silence(self, index: int) -> None:
        """Make a worker hang: it sends no more heartbeats."""
        self.workers[index].says = None

    def run(self, seconds: float) -> bool:
        self.at(seconds, self.supervisor.stop)
        return self.supervisor.run()


def test_a_serving_worker_is_left_alone_until_the_supervisor_stops() -> None:
    machine = Machine(2)
    assert machine.run(100)
    assert [worker.status for worker in machine.workers] == [0, 0]
    assert not machine.forgotten


def test_a_worker_that_hangs_is_replaced() -> None:
    """Otherwise it would still get its share of the connections."""
    machine = Machine()
    machine.at(100, lambda: machine.silence(0))
    assert machine.run(200)
    first, second = machine.workers
    assert first.killed_at == pytest.approx(99 + TIMING.silence_s, abs=2 * TIMING.watch_interval_s)
    assert second.started_at == pytest.approx(first.killed_at, abs=2 * TIMING.watch_interval_s)
    assert second.killed_at is None


def test_a_worker_that_sends_no_heartbeat_is_killed_when_its_start_takes_too_long() -> None:
    machine = Machine(says=None)
    assert machine.run(100)
    first, second = machine.workers
    assert first.killed_at == pytest.approx(TIMING.start_s, abs=2 * TIMING.watch_interval_s)
    assert second.killed_at is None


def test_a_worker_that_sends_heartbeats_while_it_prepares_is_not_killed() -> None:
    machine = Machine(says=PREPARING)
    assert machine.run(2 * TIMING.start_s)
    assert len(machine.workers) == 1


def test_a_killed_worker_is_replaced_and_its_gauges_are_removed() -> None:
    machine = Machine()
    machine.at(20, lambda: machine.end(0, -9))
    assert machine.run(60)
    first, second = machine.workers
    assert machine.forgotten == [first.pid]
    assert second.started_at == 20
    assert second.killed_at is None


def test_the_heartbeat_file_of_an_ended_worker_is_removed() -> None:
    """Another process may get the same ID."""
    machine, files = Machine(), list[bool]()
    for seconds in (4, 6):
        machine.at(seconds, lambda: files.append(heartbeat_file(machine.folder, machine.workers[0].pid).exists()))
    machine.at(5, lambda: machine.end(0, -9))
    assert machine.run(8)
    assert files == [True, False]


def test_a_worker_that_crashes_at_once_is_restarted_only_after_the_replacement_interval() -> None:
    machine = Machine(status=-9)
    assert machine.run(35)
    assert [worker.started_at for worker in machine.workers] == [0, 10, 20, 30]


def test_a_worker_that_ends_with_a_known_failure_is_replaced_once_a_worker_has_served() -> None:
    machine = Machine(2)
    machine.at(5, lambda: machine.end(1, 1))
    assert machine.run(60)
    assert len(machine.workers) == 3
    assert machine.workers[0].status == 0


@pytest.mark.parametrize("status", [1, 2])
@pytest.mark.parametrize("others_say", [None, PREPARING])
def test_a_known_failure_ends_all_workers_before_a_worker_has_served(status: int, others_say: str | None) -> None:
    machine = Machine(2, says=others_say)
    machine.at(5, lambda: machine.end(1, status))
    assert not machine.run(60)
    assert machine.now == 5
    assert [worker.status for worker in machine.workers] == [0, status]


def test_a_worker_that_crashes_before_any_has_served_is_replaced() -> None:
    machine = Machine(says=PREPARING)
    machine.at(15, lambda: machine.end(0, -11))
    assert machine.run(60)
    assert len(machine.workers) == 2


def test_a_failed_start_is_retried_and_the_other_workers_continue(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(2)
    machine.at(20, lambda: machine.refusals.append(OSError("no processes left")))
    machine.at(20, lambda: machine.end(1, -9))
    assert machine.run(60)
    first, _, third = machine.workers
    assert third.started_at == 20 + TIMING.replacement_interval_s
    assert first.status == third.status == 0
    assert "failed to start a worker: no processes left" in caplog.text


def test_workers_that_do_not_stop_are_killed_after_the_drain_time() -> None:
    """All workers share one deadline."""
    machine = Machine(3, is_deaf=True)
    assert machine.run(20)
    assert [worker.killed_at for worker in machine.workers] == [20 + DRAIN_S + TIMING.kill_margin_s] * 3


def test_the_metrics_folder_is_removed_when_the_supervisor_ends() -> None:
    machine = Machine()
    assert machine.run(1)
    assert machine.folder
    assert not Path(machine.folder).exists()
