import logging
import math
from collections.abc import Sequence

import pytest
from torch import Tensor

from service.execution.idle_turns import (
    BUDGET_SHARE,
    MAX_EXPECTED_ARRIVALS,
    MAX_OTHERS_LOAD,
    MAX_SHARE_OF_QUIET,
    QUIET_S,
    RECHECK_S,
    IdleBatch,
    IdleTurns,
    Room,
)
from service.execution.results import Result
from service.execution.throttle import UtilizationLimiter
from service.scheduling.catalog import VariantCatalog
from service.scheduling.level_policy import choose_level
from service.scheduling.scheduler import Scheduler
from service.scheduling.state import QueuedRequest
from tests.service.execution.looks import IMAGE, looks_of
from tests.service.granting import constraints_for

BUDGET_S = 1.0


class Work:
    """Idle work: a number of batches of some seconds each, in virtual time."""

    def __init__(self, moment: "Moment", seconds: float, number: int = 1_000_000) -> None:
        self.moment, self.seconds, self.number = moment, seconds, number
        self.ran_at: list[float] = []
        self.rooms: list[Room] = []
        self.heard: list[int] = []
        self.error: Exception | None = None
        self.is_closed = False

    def starts_at(self) -> float | None:
        return -math.inf if self.number and not self.is_closed else None

    def due(self, _: float, room: Room) -> IdleBatch | None:
        self.rooms.append(room)
        if self.starts_at() is None or self.seconds > room.seconds:
            return None
        return IdleBatch(self.seconds, self.run, "the work failed")

    def run(self) -> float:
        self.moment.watched.append((self.moment.turns.running, self.moment.scheduler.free_at))
        if self.error:
            raise self.error
        self.number -= 1
        self.ran_at.append(self.moment.now)
        self.moment.now += self.seconds
        return self.seconds

    def batch_ran(self, images: Sequence[Tensor], results: Sequence[Result]) -> None:
        self.heard.append(len(images) * len(results))

    def close(self) -> None:
        self.is_closed = True


class Moment:
    """An engine with nothing to do, in virtual time."""

    def __init__(self, catalog: VariantCatalog, ceiling: float | None = None) -> None:
        self.now, self.others = 100.0, 0.0
        self.watched: list[tuple[tuple[float, float] | None, float]] = []
        self.scheduler = Scheduler(catalog, choose_level, 4)
        self.works: list[Work] = []
        self.turns = IdleTurns(
            self.works,
            self.scheduler,
            BUDGET_S,
            UtilizationLimiter(ceiling, None),
            lambda: self.others,
            clock=lambda: self.now,
        )

    def work(self, seconds: float, number: int = 1_000_000) -> Work:
        self.works.append(Work(self, seconds, number))
        return self.works[-1]

    def serve(self) -> None:
        """Let a batch of requests end now."""
        self.turns.batch_ran([IMAGE], looks_of(self.scheduler.catalog.lowest, [0], ended_at=self.now))

    def wait(self, until: float = math.inf) -> bool:
        """Let the engine's thread wait for a request and take its turn; return False once it would wait longer."""
        wait_s = self.turns.wait_s(is_expecting=False)
        if wait_s is None or self.now + wait_s >= until:
            return False
        self.now += wait_s
        self.turns.take_turn()
        return True


@pytest.fixture
def moment(catalog: VariantCatalog) -> Moment:
    return Moment(catalog)


def test_idle_work_runs_only_after_the_engine_has_been_quiet_for_a_moment(moment: Moment) -> None:
    moment.work(0.01)
    assert moment.turns.wait_s(is_expecting=False) == pytest.approx(QUIET_S)
    moment.now += 10
    moment.serve()
    assert moment.turns.wait_s(is_expecting=False) == pytest.approx(QUIET_S)
    moment.now += 10
    assert moment.turns.wait_s(is_expecting=True) == pytest.approx(QUIET_S)
    assert moment.turns.wait_s(is_expecting=False) == pytest.approx(QUIET_S)
    moment.now += QUIET_S
    assert moment.turns.wait_s(is_expecting=False) == 0


def test_an_engine_waits_for_ever_once_no_idle_work_is_left(moment: Moment) -> None:
    assert moment.turns.wait_s(is_expecting=False) is None
    work = moment.work(0.01, 2)
    while moment.wait():
        pass
    assert len(work.ran_at) == 2


def test_the_first_kind_of_work_runs_first_and_others_get_the_time_that_it_leaves(moment: Moment) -> None:
    first, second = moment.work(0.01, 2), moment.work(0.02, 2)
    while moment.wait():
        pass
    assert max(first.ran_at) < min(second.ran_at)
    assert len(second.ran_at) == 2


def test_a_short_batch_runs_where_there_is_no_room_for_the_batch_of_the_first_kind_of_work(moment: Moment) -> None:
    long, short = moment.work(BUDGET_SHARE * BUDGET_S + 0.01, 1), moment.work(0.01, 1)
    assert moment.wait()
    assert not long.ran_at
    assert short.ran_at


def test_every_kind_of_work_observes_the_batches_of_requests(moment: Moment) -> None:
    works = moment.work(0.01), moment.work(0.01)
    moment.serve()
    assert [work.heard for work in works] == [[1], [1]]


def test_an_idle_batch_that_exceeds_its_share_of_a_tight_budget_waits_for_a_long_quiet_time(moment: Moment) -> None:
    budget_s, seconds = 0.4, 0.2
    request = QueuedRequest(moment.now + 20, constraints_for(budget_s, 2))
    moment.scheduler.admit(request, moment.now - 60)
    moment.scheduler.enqueue(request)
    moment.scheduler.withdraw(request)
    moment.serve()
    began = moment.now
    work = moment.work(seconds, 1)
    assert seconds > BUDGET_SHARE * budget_s
    while moment.wait():
        pass
    assert work.ran_at == [pytest.approx(began + seconds / MAX_SHARE_OF_QUIET, abs=2 * RECHECK_S)]


def test_the_default_budget_bounds_idle_batches_before_the_first_request(moment: Moment) -> None:
    moment.work(BUDGET_SHARE * BUDGET_S, 1)
    moment.wait()
    assert moment.now == pytest.approx(100 + QUIET_S + BUDGET_SHARE * BUDGET_S)


@pytest.mark.parametrize("rate", [1, 10])
def test_a_higher_arrival_rate_allows_only_shorter_idle_batches(moment: Moment, rate: int) -> None:
    work = moment.work(0.5 * MAX_EXPECTED_ARRIVALS)
    for number in range(30 * rate):
        if number == rate:
            work.ran_at.clear()  # by now the arrival rate is known
        moment.scheduler.rejected("full", moment.now)  # which counts as an arrival
        moment.serve()
        until = moment.now + 0.99 / rate
        while moment.wait(until):
            pass
        moment.now = max(moment.now, until)
    assert bool(work.ran_at) == (rate == 1)


def test_the_scheduler_and_the_watchdog_know_of_a_running_idle_batch(moment: Moment) -> None:
    moment.work(0.02, 1)
    moment.wait()
    ((running, free_at),) = moment.watched
    assert running == pytest.approx((100 + QUIET_S, 0.02))
    assert free_at == pytest.approx(100 + QUIET_S + 0.02)
    assert moment.turns.running is None
    assert moment.scheduler.free_at == moment.now


def test_no_idle_batch_runs_while_other_processes_load_the_machine_but_work_is_still_asked(moment: Moment) -> None:
    moment.others = MAX_OTHERS_LOAD + 0.01
    work = moment.work(0.01, 1)
    for _ in range(20):
        moment.wait()
    assert not work.ran_at
    assert [room.seconds for room in work.rooms] == [0.0] * 20
    assert moment.now == pytest.approx(100 + QUIET_S + 19 * RECHECK_S)
    moment.others = MAX_OTHERS_LOAD
    moment.wait()
    assert work.ran_at


def test_the_utilization_ceiling_applies_to_idle_batches(catalog: VariantCatalog) -> None:
    moment = Moment(catalog, ceiling=0.1)
    work = moment.work(0.01)
    while moment.wait(130):
        pass
    assert 0.05 * 30 < 0.01 * len(work.ran_at) < 0.12 * 30


def test_work_that_fails_is_closed_and_other_work_continues(moment: Moment, caplog: pytest.LogCaptureFixture) -> None:
    first, second = moment.work(0.01), moment.work(0.01, 2)
    first.error = RuntimeError("out of memory")
    with caplog.at_level(logging.ERROR):
        while moment.wait():
            pass
    assert "the work failed" in caplog.text
    assert first.is_closed
    assert len(second.ran_at) == 2
    assert moment.turns.running is None


def test_close_closes_every_kind_of_work(moment: Moment) -> None:
    works = moment.work(0.01), moment.work(0.01)
    moment.turns.close()
    assert all(work.is_closed for work in works)
