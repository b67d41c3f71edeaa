import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from service.errors import NotReadyError
from service.execution.engine_thread import GAP_S, QUIET_S, WORK_SHARE, EngineThread

WAIT_S = 10  # seconds of real time, at most


class Hours:
    """A clock that advances with turns."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Scripted:
    """Has a number of batches to run, by default of a second each; is over once all have run and it may end."""

    def __init__(self, name: str, ran: list[str], hours: Hours, batches: int = 0, due_s: float = math.inf) -> None:
        self.name, self.ran, self.hours, self.due_s = name, ran, hours, due_s
        self.batches, self.batch_s, self.may_end = batches, 1.0, False
        self.running: tuple[float, float] | None = None
        self.error: Exception | None = None
        self.failing = "turn"
        self.freed_at: list[float] = []
        self.rests = threading.Event()
        self.idled, self.is_closed = threading.Event(), False
        self.then: Callable[[], None] = lambda: None

    @property
    def has_work(self) -> bool:
        return self.batches > 0

    @property
    def is_over(self) -> bool:
        return self.may_end and not self.batches

    def take_turn(self) -> None:
        self.batches -= 1
        self.hours.now += self.batch_s
        self.ran.append(self.name)
        if self.failing == "turn" and self.error:
            raise self.error
        self.then()

    def rest(self) -> float:
        self.rests.set()
        if self.failing == "rest" and self.error:
            raise self.error
        return self.due_s

    def take_idle_turn(self) -> None:
        self.idled.set()
        if self.failing == "idle turn" and self.error:
            raise self.error

    def engine_freed(self) -> None:
        self.freed_at.append(self.hours.now)

    def close(self) -> None:
        self.is_closed = True
        if self.failing == "close" and self.error:
            raise self.error


class Stage:
    def __init__(self) -> None:
        self.hours, self.ran = Hours(), list[str]()
        self.thread = EngineThread(self.hours)
        self.served: deque[Scripted] = deque()

    def scripted(self, name: str, batches: int = 0, due_s: float = math.inf) -> Scripted:
        self.served.append(Scripted(name, self.ran, self.hours, batches, due_s))
        return self.served[-1]

    def held_back(self) -> threading.Event:
        """Keep the thread busy until the event is set, so that all batchers served until then start together."""
        may_go_on = threading.Event()
        self.thread.submit(lambda: may_go_on.wait(WAIT_S))
        return may_go_on


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    for served in stage.served:
        served.batches, served.may_end = 0, True
    stage.thread.wake()
    stage.thread.shutdown(wait=True)


def test_batchers_take_turns_of_one_batch_and_leave_when_they_are_over(stage: Stage) -> None:
    one, other = stage.scripted("one", 2), stage.scripted("other", 3)
    one.may_end = other.may_end = True
    go = stage.held_back()
    ends = [stage.thread.serve(each) for each in (one, other)]
    go.set()
    assert [end.result(WAIT_S) for end in ends] == [None, None]
    assert stage.ran == ["one", "other", "one", "other", "other"]
    assert one.is_closed
    assert other.is_closed


def test_a_batcher_that_fails_ends_and_the_others_continue(stage: Stage) -> None:
    one, other = stage.scripted("one", 2), stage.scripted("other", 2)
    one.error, other.may_end = ZeroDivisionError(), True
    go = stage.held_back()
    failed, fine = (stage.thread.serve(each) for each in (one, other))
    go.set()
    assert isinstance(failed.exception(WAIT_S), ZeroDivisionError)
    assert fine.result(WAIT_S) is None
    assert stage.ran == ["one", "other", "other"]


def test_a_batcher_whose_rest_fails_ends_and_the_others_continue(stage: Stage) -> None:
    one, other = stage.scripted("one", due_s=0.0), stage.scripted("other")
    one.error, one.failing = ZeroDivisionError(), "rest"
    go = stage.held_back()
    failed, fine = (stage.thread.serve(each) for each in (one, other))
    go.set()
    assert isinstance(failed.exception(WAIT_S), ZeroDivisionError)
    assert not fine.done()
    other.batches, other.may_end = 1, True
    stage.thread.wake()
    assert fine.result(WAIT_S) is None
    assert stage.ran == ["other"]


def test_a_batcher_that_cannot_close_ends_nonetheless(stage: Stage) -> None:
    one = stage.scripted("one", 1)
    one.error, one.failing, one.may_end = ZeroDivisionError(), "close", True
    assert stage.thread.serve(one).result(WAIT_S) is None


def test_a_batcher_that_joins_while_all_others_rest_is_served_at_once(stage: Stage) -> None:
    resting, late = stage.scripted("resting"), stage.scripted("late", 1)
    stage.thread.serve(resting)
    assert resting.rests.wait(WAIT_S)
    late.may_end = True
    assert stage.thread.serve(late).result(WAIT_S) is None


def test_turns_of_others_count_as_turnaround_only_for_batchers_that_want_a_turn(stage: Stage) -> None:
    busy, resting = stage.scripted("busy", 2), stage.scripted("resting")
    busy.may_end = True
    go = stage.held_back()
    end = stage.thread.serve(busy)
    stage.thread.serve(resting)
    go.set()
    end.result(WAIT_S)
    assert busy.freed_at == []
    assert resting.freed_at[:2] == [101.0, 102.0]


def test_work_runs_at_once_where_the_engine_has_been_quiet(stage: Stage) -> None:
    resting = stage.scripted("resting")
    stage.thread.serve(resting)
    assert resting.rests.wait(WAIT_S)
    assert stage.thread.work(lambda: 7).result(WAIT_S) == 7


def test_work_gets_its_share_of_the_engine_while_requests_come(stage: Stage) -> None:
    pieces, busy = 4, stage.scripted("busy", 60)

    def piece() -> None:
        stage.hours.now += 1.0
        stage.ran.append("work")

    go = stage.held_back()
    stage.thread.serve(busy)
    done = [stage.thread.work(piece) for _ in range(pieces)]
    go.set()
    for each in done:
        each.result(WAIT_S)
    places = [place for place, name in enumerate(stage.ran) if name == "work"]
    between = math.ceil(1 / WORK_SHARE - 1 + GAP_S)
    assert [after - before - 1 for before, after in pairwise(places)] == [between] * (pieces - 1)


@pytest.mark.parametrize(("waiting", "before"), [(1, 1), (2, 2), (60, 4)])
def test_work_waits_a_short_time_for_a_moment_in_which_no_request_does(stage: Stage, waiting: int, before: int) -> None:
    busy = stage.scripted("busy", waiting)
    busy.batch_s = 0.3 * GAP_S
    stage.hours.now += QUIET_S
    go = stage.held_back()
    stage.thread.serve(busy)
    work = stage.thread.work(lambda: stage.ran.append("work"))
    go.set()
    work.result(WAIT_S)
    assert stage.ran[: before + 1] == ["busy"] * before + ["work"]


def test_failed_work_raises_for_its_caller_and_the_next_piece_runs(stage: Stage) -> None:
    stage.thread.serve(stage.scripted("resting"))
    failing = stage.thread.work(lambda: 1 // 0)
    assert isinstance(failing.exception(WAIT_S), ZeroDivisionError)
    stage.hours.now += QUIET_S
    stage.thread.wake()
    assert stage.thread.work(lambda: 7).result(WAIT_S) == 7


def test_work_and_batches_are_reported_as_running_to_the_watchdog(stage: Stage) -> None:
    resting = stage.scripted("resting")
    stage.thread.serve(resting)
    assert stage.thread.running is None
    running = stage.thread.work(lambda: stage.thread.running).result(WAIT_S)
    assert running is not None
    assert running[0] == stage.hours.now
    resting.running = (5.0, 6.0)
    assert stage.thread.running == (5.0, 6.0)


def test_work_fails_where_nothing_is_served_or_serving_has_ended(stage: Stage) -> None:
    assert isinstance(stage.thread.work(lambda: 7).exception(WAIT_S), NotReadyError)
    busy = stage.scripted("busy", 2)
    busy.may_end = True
    go = stage.held_back()
    stage.thread.serve(busy)
    first, second = (stage.thread.work(lambda: setattr(stage.hours, "now", stage.hours.now + 1)) for _ in range(2))
    go.set()
    assert first.result(WAIT_S) is None
    assert isinstance(second.exception(WAIT_S), NotReadyError)


def test_idle_turns_are_given_only_while_a_single_batcher_is_served(stage: Stage) -> None:
    leaving, staying = stage.scripted("leaving", due_s=0.0), stage.scripted("staying", due_s=0.0)
    go = stage.held_back()
    end, _ = (stage.thread.serve(each) for each in (leaving, staying))
    go.set()
    assert staying.rests.wait(WAIT_S)
    stage.thread.work(lambda: None).result(WAIT_S)  # after a turn in which both had rested
    assert not leaving.idled.is_set()
    assert not staying.idled.is_set()
    leaving.may_end = True
    stage.thread.wake()
    assert end.result(WAIT_S) is None
    assert staying.idled.wait(WAIT_S)


def test_a_batcher_whose_idle_turn_fails_ends(stage: Stage) -> None:
    one = stage.scripted("one", due_s=0.0)
    one.error, one.failing = ZeroDivisionError(), "idle turn"
    assert isinstance(stage.thread.serve(one).exception(WAIT_S), ZeroDivisionError)


def test_an_error_in_the_loop_fails_the_futures_of_all_batchers(stage: Stage) -> None:
    broken, other = stage.scripted("broken"), stage.scripted("other", 1)
    broken.engine_freed = lambda: 1 // 0  # type: ignore[method-assign,assignment] # a bug on purpose
    go = stage.held_back()
    ends = [stage.thread.serve(each) for each in (broken, other)]
    go.set()
    assert all(isinstance(end.exception(WAIT_S), ZeroDivisionError) for end in ends)
