import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

import pytest
import torch
from torch import Tensor

from models.latency import LatencyTable
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from service.batcher import FAILURES_IN_A_ROW, Batcher
from service.errors import DeadlineError, InvalidImageError, ModelError, NotReadyError, OverloadedError, ServiceError
from service.line import Line
from service.menu import Menu
from service.pacer import Pacer
from service.policy import choose_level
from service.results import Result
from service.situation import Choice, Entry, Situation, Wish

SMALL, LARGE = SubNetwork(2, 0.5), SubNetwork(4, 1.0)
ROWS = tuple(SubNetworkProfile(sub, macs, top1) for sub, macs, top1 in ((SMALL, 1, 0.5), (LARGE, 2, 0.8)))
MENU = Menu.of(ProfileTable(ROWS), LatencyTable((1, 4), {SMALL: (1e-6, 2e-6), LARGE: (2e-6, 4e-6)}))

pytestmark = pytest.mark.anyio

P = ParamSpec("P")
T = TypeVar("T")


class Gate:
    """A model whose batches wait until it is opened, and which notes what it was given."""

    def __init__(self) -> None:
        self.batches: list[tuple[SubNetwork, list[int]]] = []
        self.sizes: list[int] = []
        self.open = threading.Event()
        self.entered = threading.Event()

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        self.entered.set()
        self.open.wait(10)
        self.batches.append((subnetwork, images[:, 0, 0, 0].tolist()))
        if 13 in self.batches[-1][1]:
            raise RuntimeError("thirteen")
        if 14 in self.batches[-1][1]:
            return images[:0, :, 0, 0].float()
        return images[:, :, 0, 0].float()


class Inline(Executor):
    """Calls at once, in the thread that submits."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except ServiceError as error:
            future.set_exception(error)
        return future


def image(value: int) -> Callable[[], Tensor]:
    return lambda: torch.full((3, 2, 2), value, dtype=torch.uint8)


@asynccontextmanager
async def serving(gate: Gate, max_batch_size: int = 4) -> AsyncIterator[Batcher]:
    line = Line(MENU, choose_level, max_batch_size)
    thread = ThreadPoolExecutor(1, "engine")
    batcher = Batcher(gate.run, line, thread, Inline(), observe_batch=lambda size, *_: gate.sizes.append(size))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.serve())
        try:
            yield batcher
        finally:
            gate.open.set()
            batcher.stop()
    thread.shutdown()


def named(subnetwork: SubNetwork, budget_s: float = 100.0) -> Entry:
    return Entry(time.monotonic() + budget_s, Wish(budget_s, 1, MENU.index_of(subnetwork, None)))


async def line_up(batcher: Batcher, *wishes: tuple[int, SubNetwork]) -> "list[asyncio.Task[Result]]":
    """Put images in line, in order of deadline."""
    tasks = [
        asyncio.create_task(batcher.submit(image(value), named(subnetwork, 100 + place)))
        for place, (value, subnetwork) in enumerate(wishes)
    ]
    await asyncio.sleep(0)
    return tasks


async def behind_a_running_batch(batcher: Batcher, gate: Gate) -> "asyncio.Task[Result]":
    (first,) = await line_up(batcher, (0, SMALL))
    await asyncio.to_thread(gate.entered.wait, 10)
    return first


class Listener(Line):
    """Notes how long the engine stood still before each batch."""

    turnarounds: list[float]

    def finished(self, option: int, size: int, seconds: float, now: float, turnaround_s: float = 0.0) -> None:
        self.turnarounds.append(turnaround_s)
        super().finished(option, size, seconds, now, turnaround_s)


class Hours:
    """A clock that a test, a model and a pacer may move."""

    def __init__(self) -> None:
        self.now = 0.0

    def run(self, images: Tensor, _: SubNetwork) -> Tensor:
        self.now += 10.0
        if 13 in images:
            raise RuntimeError("thirteen")
        return images[:, :, 0, 0].float()

    def prepare(self) -> Tensor:
        return torch.zeros(3, 2, 2, dtype=torch.uint8)


class Idling(Batcher):
    """Says when it has nothing to do."""

    idle: threading.Event

    def _await_arrival(self) -> None:
        self.idle.set()
        super()._await_arrival()


class Pausing(Pacer):
    """Lets an hour go by before every third batch."""

    def __init__(self, hours: Hours) -> None:
        super().__init__(None, None)
        self._hours, self._asked = hours, 0

    def pause_s(self, _: float) -> float:
        self._asked += 1
        if self._asked % 3:
            return 0.0
        self._hours.now += 3600.0
        return 1e-6


async def test_a_pacer_hears_when_nobody_waits() -> None:
    """Late requests leave the line without a batch, and what is used then must not be the next one's."""
    hours, line, used_s = Hours(), Line(MENU, choose_level, 4), [0.0]
    pacer, thread = Pacer(0.5, 1.0, lambda: used_s[0]), ThreadPoolExecutor(1, "engine")
    batcher = Idling(hours.run, line, thread, Inline(), pacer=pacer, clock=lambda: hours.now)
    batcher.idle = threading.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.serve())
        with pytest.raises(DeadlineError):
            await batcher.submit(hours.prepare, Entry(-1.0, Wish(1.0, 1)))
        await asyncio.to_thread(batcher.idle.wait, 10)
        used_s[0] += 300.0  # while an hour goes by
        hours.now += 3600.0
        await batcher.submit(hours.prepare, Entry(1e9, Wish(1e9, 1)))
        batcher.stop()
    thread.shutdown()
    assert pacer.stretch == 1.0


@pytest.mark.parametrize("paced", [False, True])
async def test_neither_idleness_nor_a_pause_nor_a_failure_counts_as_time_between_batches(paced: bool) -> None:
    hours, line = Hours(), Listener(MENU, choose_level, 4)
    line.turnarounds = []
    pacer = Pausing(hours) if paced else None
    thread = ThreadPoolExecutor(1, "engine")
    batcher = Idling(hours.run, line, thread, Inline(), pacer=pacer, clock=lambda: hours.now)
    batcher.idle = threading.Event()

    def waits(subnetwork: SubNetwork) -> Entry:
        return Entry(1e9, Wish(1e9, 1, MENU.index_of(subnetwork, None)))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.serve())
        for _ in range(3):
            await asyncio.to_thread(batcher.idle.wait, 10)
            hours.now += 500.0  # nobody waits
            batcher.idle.clear()
            await batcher.submit(hours.prepare, waits(SMALL))
        prepared = [(image(13), SMALL), (hours.prepare, SMALL), (hours.prepare, LARGE), (hours.prepare, SMALL)]
        crowd = [batcher.submit(prepare, waits(subnetwork)) for prepare, subnetwork in prepared]
        failed, *others = await asyncio.gather(*crowd, return_exceptions=True)
        batcher.stop()
    thread.shutdown()
    assert isinstance(failed, ModelError)
    assert all(isinstance(other, Result) for other in others)
    assert max(line.turnarounds) == 0.0


async def test_a_request_gets_its_own_row_and_its_times() -> None:
    gate = Gate()
    gate.open.set()
    async with serving(gate) as batcher:
        result = await batcher.submit(image(7), named(SMALL))
    assert result.logits.tolist() == [7, 7, 7]
    assert result.inference_s == result.ended_at - result.started_at > 0


async def test_those_who_want_the_same_sub_network_run_together_in_order_of_deadline() -> None:
    gate = Gate()
    async with serving(gate) as batcher:
        first = await behind_a_running_batch(batcher, gate)
        rest = await line_up(batcher, (1, LARGE), (2, SMALL), (3, LARGE), (4, SMALL))
        gate.open.set()
        results = await asyncio.gather(first, *rest)
    assert gate.batches == [(SMALL, [0]), (LARGE, [1, 3]), (SMALL, [2, 4])]
    assert [int(result.logits[0]) for result in results] == [0, 1, 2, 3, 4]


async def test_a_batch_never_exceeds_its_limit() -> None:
    gate = Gate()
    async with serving(gate, max_batch_size=2) as batcher:
        first = await behind_a_running_batch(batcher, gate)
        rest = await line_up(batcher, *((value, SMALL) for value in range(1, 6)))
        gate.open.set()
        await asyncio.gather(first, *rest)
    assert [values for _, values in gate.batches] == [[0], [1, 2], [3, 4], [5]]
    assert gate.sizes == [1, 2, 2, 1]


async def test_a_client_that_left_costs_no_compute() -> None:
    gate = Gate()
    async with serving(gate) as batcher:
        first = await behind_a_running_batch(batcher, gate)
        leaving, staying = await line_up(batcher, (1, SMALL), (2, SMALL))
        leaving.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(first, staying)
    assert gate.batches == [(SMALL, [0]), (SMALL, [2])]


async def test_a_client_that_leaves_while_its_batch_runs_disturbs_nobody() -> None:
    gate = Gate()
    async with serving(gate) as batcher:
        first = await behind_a_running_batch(batcher, gate)
        first.cancel()
        await asyncio.sleep(0)
        (second,) = await line_up(batcher, (1, SMALL))
        gate.open.set()
        assert (await second).logits.tolist() == [1, 1, 1]


async def test_a_failing_batch_fails_its_own_requests_and_the_next_one_runs() -> None:
    gate = Gate()
    async with serving(gate) as batcher:
        first = await behind_a_running_batch(batcher, gate)
        doomed, fine = await line_up(batcher, (13, SMALL), (1, LARGE))
        gate.open.set()
        with pytest.raises(ModelError) as caught:
            await doomed
        assert "thirteen" not in caught.value.message
        await first
        assert (await fine).logits.tolist() == [1, 1, 1]


async def test_an_answer_with_rows_missing_fails_its_own_requests_and_the_next_one_runs() -> None:
    gate = Gate()
    gate.open.set()
    async with serving(gate) as batcher:
        with pytest.raises(ModelError):
            await batcher.submit(image(14), named(SMALL))
        assert (await batcher.submit(image(1), named(SMALL))).logits.tolist() == [1, 1, 1]


async def test_stopping_answers_who_is_in_line_and_refuses_who_comes_later() -> None:
    gate = Gate()
    async with serving(gate) as batcher:
        first = await behind_a_running_batch(batcher, gate)
        (second,) = await line_up(batcher, (1, SMALL))
        batcher.stop()
        with pytest.raises(NotReadyError):
            await batcher.submit(image(2), named(SMALL))
        gate.open.set()
        assert [int(result.logits[0]) for result in await asyncio.gather(first, second)] == [0, 1]


async def test_a_request_that_poisons_its_batch_is_found_and_its_mates_are_answered() -> None:
    gate = Gate()
    async with serving(gate) as batcher:
        first = await behind_a_running_batch(batcher, gate)
        tasks = await line_up(batcher, (1, SMALL), (13, SMALL), (2, SMALL), (3, SMALL))
        gate.open.set()
        outcomes = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Result, Result, ModelError, Result, Result]
    assert [values for _, values in gate.batches] == [[0], [1, 13, 2, 3], [1, 13], [1], [13], [2, 3]]
    assert gate.sizes == [1, 1, 2]  # of those that ran through


async def test_images_that_all_fail_do_not_end_a_model_that_answers_others() -> None:
    gate = Gate()
    gate.open.set()
    async with serving(gate) as batcher:
        for _ in range(2 * FAILURES_IN_A_ROW):
            with pytest.raises(ModelError):
                await batcher.submit(image(13), named(SMALL))
        assert (await batcher.submit(image(1), named(SMALL))).logits.tolist() == [1, 1, 1]
    assert [values for _, values in gate.batches].count([0]) == 2  # the blank images


async def test_a_model_that_fails_whatever_the_image_ends_the_loop() -> None:
    calls: list[int] = []

    def run(images: Tensor, _: SubNetwork) -> Tensor:
        calls.append(len(images))
        if len(calls) > 2:
            raise RuntimeError("device-side assert")
        return images[:, :, 0, 0].float()

    batcher = Batcher(run, Line(MENU, choose_level, 4), ThreadPoolExecutor(1, "engine"), Inline())
    loop = asyncio.create_task(batcher.serve())
    for _ in range(2):
        await batcher.submit(image(1), named(SMALL))
    for _ in range(FAILURES_IN_A_ROW):
        with pytest.raises(ModelError):
            await batcher.submit(image(1), named(SMALL))
    with pytest.raises(RuntimeError, match="whatever the image"):
        await asyncio.wait_for(loop, 10)
    assert len(calls) == 2 + FAILURES_IN_A_ROW + 1
    with pytest.raises(NotReadyError):
        await batcher.submit(image(1), named(SMALL))


async def test_two_poisons_and_a_batch_with_rows_missing_are_found_likewise() -> None:
    gate = Gate()
    async with serving(gate) as batcher:
        first = await behind_a_running_batch(batcher, gate)
        tasks = await line_up(batcher, (14, SMALL), (1, SMALL), (2, SMALL), (13, SMALL))
        gate.open.set()
        outcomes = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Result, ModelError, Result, Result, ModelError]
    assert [int(outcome.logits[0]) for outcome in outcomes if isinstance(outcome, Result)] == [0, 1, 2]


async def test_who_has_left_is_not_run_again_when_the_batch_fails() -> None:
    gate = Gate()
    batcher = Batcher(gate.run, Line(MENU, choose_level, 4), ThreadPoolExecutor(1, "engine"), Inline())
    doomed, leaving, staying = await line_up(batcher, (13, SMALL), (1, SMALL), (2, SMALL))
    serving = asyncio.create_task(batcher.serve())
    await asyncio.to_thread(gate.entered.wait, 10)
    leaving.cancel()
    await asyncio.wait((leaving,))
    gate.open.set()
    outcomes = await asyncio.gather(doomed, staying, return_exceptions=True)
    batcher.stop()
    await serving
    assert [type(outcome) for outcome in outcomes] == [ModelError, Result]
    assert [values for _, values in gate.batches] == [[13, 1, 2], [13], [2]]


async def test_a_request_that_is_cancelled_leaves_the_line() -> None:
    line = Line(MENU, choose_level, 4)
    batcher = Batcher(Gate().run, line, ThreadPoolExecutor(1, "engine"), Inline())
    entry = named(SMALL)
    line.admit(entry, time.monotonic())
    task = asyncio.create_task(batcher.submit(image(1), entry))
    await asyncio.sleep(0)
    assert len(line) == 1
    task.cancel()
    await asyncio.wait((task,))
    assert len(line) == 0
    assert line.backlog_s(time.monotonic()) == 0.0


async def test_an_image_that_cannot_be_prepared_fails_its_own_request() -> None:
    def broken() -> Tensor:
        raise InvalidImageError("no image")

    gate = Gate()
    gate.open.set()
    async with serving(gate) as batcher:
        with pytest.raises(InvalidImageError, match="no image"):
            await batcher.submit(broken, named(SMALL))
        assert (await batcher.submit(image(1), named(SMALL))).logits.tolist() == [1, 1, 1]
    assert gate.sizes == [1]


async def test_who_leaves_before_the_image_is_prepared_does_not_get_in_line() -> None:
    begun, go_on = threading.Event(), threading.Event()
    line = Line(MENU, choose_level, 4)
    preparers = ThreadPoolExecutor(1, "decode")
    batcher = Batcher(Gate().run, line, ThreadPoolExecutor(1, "engine"), preparers)

    def slow() -> Tensor:
        begun.set()
        go_on.wait(10)
        return image(1)()

    entries = [named(SMALL), named(SMALL)]
    tasks = []
    for entry in entries:
        line.admit(entry, time.monotonic())
        tasks.append(asyncio.create_task(batcher.submit(slow, entry)))
    await asyncio.to_thread(begun.wait, 10)
    assert line.backlog_s(time.monotonic()) > 0
    begun.clear()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    go_on.set()
    preparers.shutdown()
    assert not begun.is_set(), "the second was taken away from those who wait for the thread"
    assert (len(line), line.backlog_s(time.monotonic())) == (0, 0.0)


async def test_a_request_whose_image_is_still_being_decoded_is_answered_at_its_deadline() -> None:
    go_on = threading.Event()
    line = Line(MENU, choose_level, 4)
    preparers = ThreadPoolExecutor(1, "decode")
    batcher = Batcher(Gate().run, line, ThreadPoolExecutor(1, "engine"), preparers)
    bomb, behind_it = named(SMALL, 0.05), named(SMALL, 0.1)
    for entry in (bomb, behind_it):
        line.admit(entry, time.monotonic())

    def slow() -> Tensor:
        go_on.wait(10)
        return image(1)()

    answers = asyncio.gather(*(batcher.submit(slow, e) for e in (bomb, behind_it)), return_exceptions=True)
    try:
        outcomes = await asyncio.wait_for(answers, 5)
    finally:
        go_on.set()
        preparers.shutdown()
    assert [type(outcome) for outcome in outcomes] == [DeadlineError, DeadlineError]
    assert (len(line), line.backlog_s(time.monotonic())) == (0, 0.0)


async def test_stopping_waits_for_who_is_still_being_prepared() -> None:
    go_on = threading.Event()
    gate = Gate()
    gate.open.set()
    batcher = Batcher(gate.run, Line(MENU, choose_level, 4), ThreadPoolExecutor(1), ThreadPoolExecutor(1))

    def slow() -> Tensor:
        go_on.wait(10)
        return image(7)()

    serving = asyncio.create_task(batcher.serve())
    task = asyncio.create_task(batcher.submit(slow, named(SMALL)))
    await asyncio.sleep(0.01)
    batcher.stop()
    await asyncio.sleep(0.01)
    assert not serving.done()
    go_on.set()
    assert (await task).logits.tolist() == [7, 7, 7]
    await asyncio.wait_for(serving, 10)


async def test_a_policy_that_fails_leaves_nobody_waiting() -> None:
    def choose(_: Situation) -> Choice:
        raise ZeroDivisionError

    batcher = Batcher(Gate().run, Line(MENU, choose, 4), ThreadPoolExecutor(1), Inline())
    tasks = await line_up(batcher, (1, SMALL), (2, SMALL))
    with pytest.raises(ZeroDivisionError):
        await batcher.serve()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [NotReadyError, NotReadyError]
    with pytest.raises(NotReadyError):
        await batcher.submit(image(3), named(SMALL))


async def test_cancelling_the_loop_releases_its_thread_and_those_who_wait() -> None:
    gate, thread = Gate(), ThreadPoolExecutor(1)
    batcher = Batcher(gate.run, Line(MENU, choose_level, 4), thread, Inline())
    serving = asyncio.create_task(batcher.serve())
    await asyncio.sleep(0.01)
    first = await behind_a_running_batch(batcher, gate)
    serving.cancel()
    await asyncio.wait((serving,))
    gate.open.set()
    thread.shutdown()  # would wait for ever
    with pytest.raises(NotReadyError):
        await first


class StubbornPacer(Pacer):
    """Asks for one pause before each batch, and stretches."""

    def __init__(self) -> None:
        super().__init__(None, None)
        self.stretch = 3.0
        self.pauses: list[float] = []
        self.ran: list[float] = []

    def pause_s(self, now: float) -> float:
        assert now == 1000.0
        self.pauses.append(0.0 if len(self.pauses) % 2 else 1e-6)
        return self.pauses[-1]

    def batch_ran(self, seconds: float) -> None:
        self.ran.append(seconds)


async def test_each_batch_waits_for_its_pause_and_knows_the_machine() -> None:
    events: list[str] = []
    now = 1000.0

    def run(images: Tensor, _: SubNetwork) -> Tensor:
        nonlocal now
        events.append("run")
        now += 0.25
        return images[:, :, 0, 0].float()

    def choose(situation: Situation) -> Choice:
        events.append("choose")
        assert (situation.now, situation.stretch, situation.slowdown) == (now, 3.0, 1.5)
        return Choice(0, tuple(situation.line))

    def observe_machine() -> None:
        events.append("observe")
        line.prior_slowdown = 1.5

    def observe_batch(*batch: float) -> None:
        batches.append(batch)

    batches: list[tuple[float, ...]] = []
    line, pacer = Line(MENU, choose, 4), StubbornPacer()
    batcher = Batcher(
        run,
        line,
        ThreadPoolExecutor(1, "engine"),
        Inline(),
        pacer=pacer,
        observe_machine=observe_machine,
        observe_batch=observe_batch,
        clock=lambda: now,
    )
    task = asyncio.create_task(batcher.submit(image(1), Entry(now + 9, Wish(9.0, 1))))
    serving = asyncio.create_task(batcher.serve())
    result = await task
    batcher.stop()
    await serving
    assert events == ["observe", "choose", "run"]
    assert pacer.pauses == [1e-6, 0.0]
    assert pacer.ran == [0.25]
    assert batches == [(1, 1.5e-6, 0.25, 0.75)]
    assert (result.inference_s, result.started_at, result.ended_at) == (0.25, 1000.0, 1000.25)
    assert line.slowdown.factor > 1  # it has learned from the batch


async def test_those_given_up_get_a_typed_error_and_the_rest_an_answer() -> None:
    def give_up(situation: Situation) -> Choice:
        late, shed, *rest = situation.line
        return Choice(0, tuple(rest), (late,), (shed,))

    gate = Gate()
    gate.open.set()
    line = Line(MENU, give_up, 4)
    batcher = Batcher(gate.run, line, ThreadPoolExecutor(1, "engine"), Inline())
    tasks = await line_up(batcher, (1, SMALL), (2, SMALL), (3, SMALL))
    serving = asyncio.create_task(batcher.serve())
    late, shed, answered = await asyncio.gather(*tasks, return_exceptions=True)
    batcher.stop()
    await serving
    assert isinstance(late, DeadlineError)
    assert isinstance(shed, OverloadedError)
    assert shed.details["retry_after_s"] >= 0
    assert isinstance(answered, Result)
