import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from models.latency import LatencyTable
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from service.decoding.decoder import DecodedImage
from service.engines.base import Run
from service.errors import DeadlineError, InvalidImageError, ModelError, NotReadyError, OverloadedError
from service.execution.batcher import FAILURES_IN_A_ROW, Batcher
from service.execution.engine_thread import EngineThread
from service.execution.results import Result
from service.execution.throttle import LONGEST_NAP_S, UtilizationLimiter
from service.scheduling.catalog import VariantCatalog
from service.scheduling.level_policy import choose_level
from service.scheduling.scheduler import Scheduler
from service.scheduling.state import BatchDecision, QueuedRequest, SchedulerState
from service.scheduling.variants import Variant
from tests.service.granting import constraints_for

SMALL, LARGE = SubNetwork(2, 0.5), SubNetwork(4, 1.0)
ROWS = tuple(SubNetworkProfile(sub, macs, top1) for sub, macs, top1 in ((SMALL, 1, 0.5), (LARGE, 2, 0.8)))
CATALOG = VariantCatalog.of(ProfileTable(ROWS), LatencyTable((1, 4), {SMALL: (1e-6, 2e-6), LARGE: (2e-6, 4e-6)}))

pytestmark = pytest.mark.anyio


class Gate:
    """A model whose batches wait until it is opened, and which records its inputs."""

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


def image(value: int) -> "Future[DecodedImage]":
    """An image that has been decoded already."""
    future: Future[DecodedImage] = Future()
    future.set_result(DecodedImage(torch.full((3, 2, 2), value, dtype=torch.uint8), 0.0, 0.0))
    return future


class AdmittingBatcher(Batcher):
    """Admits each request to the scheduler, and withdraws it in the end, as the pipeline does."""

    def __init__(self, run: Run, scheduler: Scheduler, thread: EngineThread, **others: Any) -> None:  # noqa: ANN401 - passed on to Batcher
        super().__init__(run, scheduler, thread, sleep=lambda _: None, **others)
        self.scheduler = scheduler

    async def submit(self, decoding: "Future[DecodedImage]", request: QueuedRequest) -> Result:
        self.scheduler.admit(request, 0.0)
        try:
            return await super().submit(decoding, request)
        finally:
            self.scheduler.withdraw(request)


@asynccontextmanager
async def serving(gate: Gate, max_batch_size: int = 4) -> AsyncIterator[Batcher]:
    scheduler = Scheduler(CATALOG, choose_level, max_batch_size, rejects_early=False, lock=threading.RLock())
    thread = EngineThread()
    batcher = AdmittingBatcher(gate.run, scheduler, thread, observe_batch=lambda size, *_: gate.sizes.append(size))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.serve())
        try:
            yield batcher
        finally:
            gate.open.set()
            batcher.stop()
    thread.shutdown(wait=True)


def named(subnetwork: SubNetwork, budget_s: float = 100.0) -> QueuedRequest:
    return QueuedRequest(
        time.monotonic() + budget_s, constraints_for(budget_s, 1, CATALOG.grant_named(subnetwork).best)
    )


async def line_up(batcher: Batcher, *asked: tuple[int, SubNetwork]) -> "list[asyncio.Task[Result]]":
    """Enqueue images, in order of deadline."""
    tasks = [
        asyncio.create_task(batcher.submit(image(value), named(subnetwork, 100 + place)))
        for place, (value, subnetwork) in enumerate(asked)
    ]
    await asyncio.sleep(0)
    return tasks


async def behind_a_running_batch(batcher: Batcher, gate: Gate) -> "asyncio.Task[Result]":
    (first,) = await line_up(batcher, (0, SMALL))
    await asyncio.to_thread(gate.entered.wait, 10)
    return first


class Listener(Scheduler):
    """Records the turnaround before each batch."""

    turnarounds: list[float]

    def batch_completed(
        self, variant: Variant, size: int, seconds: float, now: float, turnaround_s: float = 0.0
    ) -> None:
        self.turnarounds.append(turnaround_s)
        super().batch_completed(variant, size, seconds, now, turnaround_s)


class Hours:
    """A clock that a test, a model and a limiter may advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def run(self, images: Tensor, _: SubNetwork) -> Tensor:
        self.now += 10.0
        if 13 in images:
            raise RuntimeError("thirteen")
        return images[:, :, 0, 0].float()


class Idling(UtilizationLimiter):
    """A limiter that signals when nothing waits."""

    def __init__(self, ceiling: float | None = None, cores: float | None = None, used_s: float = 0.0) -> None:
        self.used_s = used_s
        super().__init__(ceiling, cores, lambda: self.used_s)
        self.is_idle = threading.Event()

    def idle(self) -> None:
        super().idle()
        self.is_idle.set()


class Pausing(Idling):
    """A limiter that lets an hour pass each third time it is asked for a pause."""

    def __init__(self, hours: Hours) -> None:
        super().__init__()
        self._hours, self._asked = hours, 0

    def pause_s(self, _: float) -> float:
        self._asked += 1
        if self._asked % 3:
            return 0.0
        self._hours.now += 3600.0
        return 1e-6


async def test_the_limiter_is_told_when_nothing_waits() -> None:
    """Expired requests leave the queue without a batch; compute used after that must not count for the next batch."""
    hours, scheduler = Hours(), Scheduler(CATALOG, choose_level, 4, rejects_early=False, lock=threading.RLock())
    limiter, thread = Idling(0.5, 1.0), EngineThread()
    batcher = AdmittingBatcher(hours.run, scheduler, thread, limiter=limiter, clock=lambda: hours.now)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.serve())
        await asyncio.to_thread(limiter.is_idle.wait, 10)
        limiter.is_idle.clear()
        with pytest.raises(DeadlineError):
            await batcher.submit(image(0), QueuedRequest(-1.0, constraints_for(1.0, 1)))
        await asyncio.to_thread(limiter.is_idle.wait, 10)
        limiter.used_s += 300.0  # while an hour goes by
        hours.now += 3600.0
        await batcher.submit(image(0), QueuedRequest(1e9, constraints_for(1e9, 1)))
        batcher.stop()
    thread.shutdown(wait=True)
    assert limiter.throttle_factor == 1.0


@pytest.mark.parametrize("paced", [False, True])
async def test_idle_time_pauses_and_failures_do_not_count_as_turnaround(paced: bool) -> None:
    hours, scheduler = Hours(), Listener(CATALOG, choose_level, 4, rejects_early=False, lock=threading.RLock())
    scheduler.turnarounds = []
    limiter = Pausing(hours) if paced else Idling()
    thread = EngineThread()
    batcher = AdmittingBatcher(hours.run, scheduler, thread, limiter=limiter, clock=lambda: hours.now)

    def waits(subnetwork: SubNetwork) -> QueuedRequest:
        return QueuedRequest(1e9, constraints_for(1e9, 1, CATALOG.grant_named(subnetwork).best))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.serve())
        for _ in range(3):
            await asyncio.to_thread(limiter.is_idle.wait, 10)
            hours.now += 500.0  # nothing waits
            limiter.is_idle.clear()
            await batcher.submit(image(0), waits(SMALL))
        images = [(image(13), SMALL), (image(0), SMALL), (image(0), LARGE), (image(0), SMALL)]
        crowd = [batcher.submit(decoded, waits(subnetwork)) for decoded, subnetwork in images]
        failed, *others = await asyncio.gather(*crowd, return_exceptions=True)
        batcher.stop()
    thread.shutdown(wait=True)
    assert isinstance(failed, ModelError)
    assert all(isinstance(other, Result) for other in others)
    assert max(scheduler.turnarounds) == 0.0


async def test_a_request_gets_its_own_row_of_logits_and_its_times() -> None:
    gate = Gate()
    gate.open.set()
    async with serving(gate) as batcher:
        result = await batcher.submit(image(7), named(SMALL))
    assert result.logits.tolist() == [7, 7, 7]
    assert result.inference_s == result.ended_at - result.started_at > 0


async def test_requests_for_the_same_sub_network_run_together_in_order_of_deadline() -> None:
    gate = Gate()
    async with serving(gate) as batcher:
        first = await behind_a_running_batch(batcher, gate)
        rest = await line_up(batcher, (1, LARGE), (2, SMALL), (3, LARGE), (4, SMALL))
        gate.open.set()
        results = await asyncio.gather(first, *rest)
    assert gate.batches == [(SMALL, [0]), (LARGE, [1, 3]), (SMALL, [2, 4])]
    assert [int(result.logits[0]) for result in results] == [0, 1, 2, 3, 4]


async def test_a_batch_never_exceeds_the_size_limit() -> None:
    gate = Gate()
    async with serving(gate, max_batch_size=2) as batcher:
        first = await behind_a_running_batch(batcher, gate)
        rest = await line_up(batcher, *((value, SMALL) for value in range(1, 6)))
        gate.open.set()
        await asyncio.gather(first, *rest)
    assert [values for _, values in gate.batches] == [[0], [1, 2], [3, 4], [5]]
    assert gate.sizes == [1, 2, 2, 1]


async def test_a_request_whose_client_has_left_is_not_run() -> None:
    gate = Gate()
    async with serving(gate) as batcher:
        first = await behind_a_running_batch(batcher, gate)
        leaving, staying = await line_up(batcher, (1, SMALL), (2, SMALL))
        leaving.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(first, staying)
    assert gate.batches == [(SMALL, [0]), (SMALL, [2])]


async def test_a_client_that_leaves_while_its_batch_runs_does_not_affect_others() -> None:
    gate = Gate()
    async with serving(gate) as batcher:
        first = await behind_a_running_batch(batcher, gate)
        first.cancel()
        await asyncio.sleep(0)
        (second,) = await line_up(batcher, (1, SMALL))
        gate.open.set()
        assert (await second).logits.tolist() == [1, 1, 1]


async def test_a_failing_batch_fails_only_its_own_requests_and_the_next_one_runs() -> None:
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


async def test_an_output_with_missing_rows_fails_its_own_requests_and_the_next_batch_runs() -> None:
    gate = Gate()
    gate.open.set()
    async with serving(gate) as batcher:
        with pytest.raises(ModelError):
            await batcher.submit(image(14), named(SMALL))
        assert (await batcher.submit(image(1), named(SMALL))).logits.tolist() == [1, 1, 1]


async def test_stopping_answers_queued_requests_and_rejects_later_ones() -> None:
    gate = Gate()
    async with serving(gate) as batcher:
        first = await behind_a_running_batch(batcher, gate)
        (second,) = await line_up(batcher, (1, SMALL))
        batcher.stop()
        with pytest.raises(NotReadyError):
            await batcher.submit(image(2), named(SMALL))
        gate.open.set()
        assert [int(result.logits[0]) for result in await asyncio.gather(first, second)] == [0, 1]


async def test_a_request_that_makes_its_batch_fail_is_found_and_the_others_are_answered() -> None:
    gate = Gate()
    async with serving(gate) as batcher:
        first = await behind_a_running_batch(batcher, gate)
        tasks = await line_up(batcher, (1, SMALL), (13, SMALL), (2, SMALL), (3, SMALL))
        gate.open.set()
        outcomes = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Result, Result, ModelError, Result, Result]
    assert [values for _, values in gate.batches] == [[0], [1, 13, 2, 3], [1, 13], [1], [13], [2, 3]]
    assert gate.sizes == [1, 1, 2]  # of the batches that succeeded


async def test_many_failing_images_do_not_end_a_model_that_answers_others() -> None:
    gate = Gate()
    gate.open.set()
    async with serving(gate) as batcher:
        for _ in range(2 * FAILURES_IN_A_ROW):
            with pytest.raises(ModelError):
                await batcher.submit(image(13), named(SMALL))
        assert (await batcher.submit(image(1), named(SMALL))).logits.tolist() == [1, 1, 1]
    assert [values for _, values in gate.batches].count([0]) == 2  # the blank images


async def test_a_model_that_fails_on_every_image_ends_the_loop() -> None:
    calls: list[int] = []

    def run(images: Tensor, _: SubNetwork) -> Tensor:
        calls.append(len(images))
        if len(calls) > 2:
            raise RuntimeError("device-side assert")
        return images[:, :, 0, 0].float()

    batcher = AdmittingBatcher(
        run,
        Scheduler(CATALOG, choose_level, 4, rejects_early=False, lock=threading.RLock()),
        EngineThread(),
    )
    loop = asyncio.create_task(batcher.serve())
    for _ in range(2):
        await batcher.submit(image(1), named(SMALL))
    for _ in range(FAILURES_IN_A_ROW):
        with pytest.raises(ModelError):
            await batcher.submit(image(1), named(SMALL))
    with pytest.raises(RuntimeError, match="on every image"):
        await asyncio.wait_for(loop, 10)
    assert len(calls) == 2 + FAILURES_IN_A_ROW + 1
    with pytest.raises(NotReadyError):
        await batcher.submit(image(1), named(SMALL))


async def test_a_failing_image_and_one_with_missing_rows_in_the_same_batch_are_both_found() -> None:
    gate = Gate()
    async with serving(gate) as batcher:
        first = await behind_a_running_batch(batcher, gate)
        tasks = await line_up(batcher, (14, SMALL), (1, SMALL), (2, SMALL), (13, SMALL))
        gate.open.set()
        outcomes = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Result, ModelError, Result, Result, ModelError]
    assert [int(outcome.logits[0]) for outcome in outcomes if isinstance(outcome, Result)] == [0, 1, 2]


async def test_a_request_whose_client_has_left_is_not_rerun_when_its_batch_fails() -> None:
    gate = Gate()
    batcher = AdmittingBatcher(
        gate.run,
        Scheduler(CATALOG, choose_level, 4, rejects_early=False, lock=threading.RLock()),
        EngineThread(),
    )
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


async def test_a_stopping_batcher_waits_for_no_cancelled_request() -> None:
    scheduler = Scheduler(CATALOG, choose_level, 4, rejects_early=False, lock=threading.RLock())
    batcher = AdmittingBatcher(Gate().run, scheduler, EngineThread())
    task = asyncio.create_task(batcher.submit(image(1), named(SMALL)))
    await asyncio.sleep(0)
    batcher.stop()
    assert not batcher.is_over
    task.cancel()
    await asyncio.wait((task,))
    assert batcher.is_over


async def test_an_image_that_cannot_be_decoded_fails_only_its_own_request() -> None:
    broken: Future[DecodedImage] = Future()
    broken.set_exception(InvalidImageError("no image"))
    gate = Gate()
    gate.open.set()
    async with serving(gate) as batcher:
        with pytest.raises(InvalidImageError, match="no image"):
            await batcher.submit(broken, named(SMALL))
        assert (await batcher.submit(image(1), named(SMALL))).logits.tolist() == [1, 1, 1]
    assert gate.sizes == [1]


async def test_a_request_cancelled_before_its_image_is_decoded_is_not_enqueued() -> None:
    scheduler = Scheduler(CATALOG, choose_level, 4, rejects_early=False, lock=threading.RLock())
    batcher = AdmittingBatcher(Gate().run, scheduler, EngineThread())
    decoding: Future[DecodedImage] = Future()
    task = asyncio.create_task(batcher.submit(decoding, named(SMALL)))
    await asyncio.sleep(0)
    assert scheduler.backlog_s(time.monotonic()) > 0
    task.cancel()
    await asyncio.wait((task,))
    decoding.set_result(image(1).result())
    assert (len(scheduler), scheduler.backlog_s(time.monotonic())) == (0, 0.0)


async def test_a_request_whose_image_is_not_decoded_by_its_deadline_gets_a_deadline_error() -> None:
    scheduler = Scheduler(CATALOG, choose_level, 4, rejects_early=False, lock=threading.RLock())
    batcher = AdmittingBatcher(Gate().run, scheduler, EngineThread())
    bomb, behind_it = named(SMALL, 0.05), named(SMALL, 0.1)
    answers = asyncio.gather(*(batcher.submit(Future(), one) for one in (bomb, behind_it)), return_exceptions=True)
    outcomes = await asyncio.wait_for(answers, 5)
    assert [type(outcome) for outcome in outcomes] == [DeadlineError, DeadlineError]
    assert (len(scheduler), scheduler.backlog_s(time.monotonic())) == (0, 0.0)


async def test_stopping_waits_for_images_that_are_still_being_decoded() -> None:
    gate, limiter = Gate(), Idling()
    gate.open.set()
    scheduler = Scheduler(CATALOG, choose_level, 4, rejects_early=False, lock=threading.RLock())
    batcher = AdmittingBatcher(gate.run, scheduler, EngineThread(), limiter=limiter)
    decoding: Future[DecodedImage] = Future()
    serving = asyncio.create_task(batcher.serve())
    task = asyncio.create_task(batcher.submit(decoding, named(SMALL)))
    await asyncio.to_thread(limiter.is_idle.wait, 10)
    limiter.is_idle.clear()
    batcher.stop()
    await asyncio.to_thread(limiter.is_idle.wait, 10)  # the loop has checked what is left to do
    assert not serving.done()
    decoding.set_result(image(7).result())
    assert (await task).logits.tolist() == [7, 7, 7]
    await asyncio.wait_for(serving, 10)


async def test_a_policy_that_fails_leaves_no_request_waiting() -> None:
    def choose(_: SchedulerState) -> BatchDecision:
        raise ZeroDivisionError

    batcher = AdmittingBatcher(
        Gate().run, Scheduler(CATALOG, choose, 4, rejects_early=False, lock=threading.RLock()), EngineThread()
    )
    tasks = await line_up(batcher, (1, SMALL), (2, SMALL))
    with pytest.raises(ZeroDivisionError):
        await batcher.serve()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [NotReadyError, NotReadyError]
    with pytest.raises(NotReadyError):
        await batcher.submit(image(3), named(SMALL))


async def test_cancelling_the_loop_releases_its_thread_and_the_pending_requests() -> None:
    gate, thread, limiter = Gate(), EngineThread(), Idling()
    scheduler = Scheduler(CATALOG, choose_level, 4, rejects_early=False, lock=threading.RLock())
    batcher = AdmittingBatcher(gate.run, scheduler, thread, limiter=limiter)
    serving = asyncio.create_task(batcher.serve())
    await asyncio.to_thread(limiter.is_idle.wait, 10)
    first = await behind_a_running_batch(batcher, gate)
    serving.cancel()
    await asyncio.wait((serving,))
    gate.open.set()
    thread.shutdown(wait=True)  # would block for ever if the loop still held the thread
    with pytest.raises(NotReadyError):
        await first


class StubbornLimiter(UtilizationLimiter):
    """Asks for one pause before each batch, and has a throttle factor of 3."""

    def __init__(self) -> None:
        super().__init__(None, None)
        self.throttle_factor = 3.0
        self.pauses: list[float] = []
        self.ran: list[float] = []

    def pause_s(self, now: float) -> float:
        assert now == 1000.0
        self.pauses.append(0.0 if len(self.pauses) % 2 else 1e-6)
        return self.pauses[-1]

    def batch_ran(self, seconds: float) -> None:
        self.ran.append(seconds)


async def test_each_batch_waits_for_its_pause_and_then_observes_the_machine() -> None:
    events: list[str] = []
    now = 1000.0

    def run(images: Tensor, _: SubNetwork) -> Tensor:
        nonlocal now
        events.append("run")
        now += 0.25
        return images[:, :, 0, 0].float()

    def choose(state: SchedulerState) -> BatchDecision:
        events.append("choose")
        assert (state.now, state.overhead_factor, state.slowdown) == (now, 3.0, 1.5)
        return BatchDecision(CATALOG.lowest, tuple(state.queue))

    def observe_machine() -> None:
        events.append("observe")
        scheduler.machine_observed(1.5)

    def observe_batch(*batch: float) -> None:
        batches.append(batch)

    batches: list[tuple[float, ...]] = []
    scheduler, limiter = Scheduler(CATALOG, choose, 4, rejects_early=False, lock=threading.RLock()), StubbornLimiter()
    batcher = AdmittingBatcher(
        run,
        scheduler,
        EngineThread(),
        limiter=limiter,
        observe_machine=observe_machine,
        observe_batch=observe_batch,
        clock=lambda: now,
    )
    task = asyncio.create_task(batcher.submit(image(1), QueuedRequest(now + 9, constraints_for(9.0, 1))))
    serving = asyncio.create_task(batcher.serve())
    result = await task
    batcher.stop()
    await serving
    assert events == ["observe", "choose", "run"]
    assert limiter.pauses == [1e-6, 0.0]
    assert limiter.ran == [0.25]
    assert batches == [(1, 1.5e-6, 0.25, 0.75)]
    assert (result.inference_s, result.started_at, result.ended_at) == (0.25, 1000.0, 1000.25)
    assert scheduler.state(now).slowdown > 1.5  # it has learned from the batch


async def test_expired_and_shed_requests_get_typed_errors_and_the_rest_an_answer() -> None:
    def drop(state: SchedulerState) -> BatchDecision:
        expired, shed, *rest = state.queue
        return BatchDecision(CATALOG.lowest, tuple(rest), (expired,), (shed,))

    gate = Gate()
    gate.open.set()
    scheduler = Scheduler(CATALOG, drop, 4, rejects_early=False, lock=threading.RLock())
    batcher = AdmittingBatcher(gate.run, scheduler, EngineThread())
    tasks = await line_up(batcher, (1, SMALL), (2, SMALL), (3, SMALL))
    serving = asyncio.create_task(batcher.serve())
    expired, shed, answered = await asyncio.gather(*tasks, return_exceptions=True)
    batcher.stop()
    await serving
    assert isinstance(expired, DeadlineError)
    assert isinstance(shed, OverloadedError)
    assert shed.details["retry_after_s"] >= 0
    assert isinstance(answered, Result)


async def test_an_answer_resets_the_count_of_consecutive_failures() -> None:
    gate = Gate()
    gate.open.set()
    async with serving(gate) as batcher:
        for value in [13] * (FAILURES_IN_A_ROW - 1) + [1] + [13] * (FAILURES_IN_A_ROW - 1):
            await asyncio.gather(batcher.submit(image(value), named(SMALL)), return_exceptions=True)
    assert [values for _, values in gate.batches].count([0]) == 0  # no blank image was run


async def test_the_engine_counts_as_free_once_a_batch_has_failed() -> None:
    minute = LatencyTable((1, 4), {SMALL: (60.0, 60.0), LARGE: (60.0, 60.0)})
    scheduler = Scheduler(VariantCatalog.of(ProfileTable(ROWS), minute), choose_level, 4, lock=threading.RLock())
    gate, thread = Gate(), EngineThread()
    batcher = AdmittingBatcher(gate.run, scheduler, thread)
    serving = asyncio.create_task(batcher.serve())
    doomed = asyncio.create_task(batcher.submit(image(13), named(SMALL)))
    await asyncio.to_thread(gate.entered.wait, 10)
    assert scheduler.free_at > time.monotonic() + 50
    gate.open.set()
    with pytest.raises(ModelError):
        await doomed
    assert scheduler.free_at <= time.monotonic()
    batcher.stop()
    await serving
    thread.shutdown(wait=True)


async def test_the_engine_counts_as_free_if_all_clients_of_a_batch_leave_during_the_decision() -> None:
    minute = LatencyTable((1, 4), {SMALL: (60.0, 60.0), LARGE: (60.0, 60.0)})
    deciding, has_left = threading.Event(), threading.Event()

    def decide(state: SchedulerState) -> BatchDecision:
        deciding.set()
        has_left.wait(10)
        return choose_level(state)

    scheduler = Scheduler(VariantCatalog.of(ProfileTable(ROWS), minute), decide, 4, lock=nullcontext())
    gate, thread = Gate(), EngineThread()
    batcher = Batcher(gate.run, scheduler, thread)
    request = named(SMALL)
    scheduler.admit(request, time.monotonic())
    serving = asyncio.create_task(batcher.serve())
    leaving = asyncio.create_task(batcher.submit(image(1), request))
    await asyncio.to_thread(deciding.wait, 10)
    leaving.cancel()
    await asyncio.wait((leaving,))
    has_left.set()
    batcher.stop()
    await serving
    thread.shutdown(wait=True)
    assert gate.batches == []
    assert scheduler.free_at <= time.monotonic()


async def test_cancelling_the_decoding_for_a_client_that_has_left_logs_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scheduler = Scheduler(CATALOG, choose_level, 4, rejects_early=False, lock=threading.RLock())
    batcher = AdmittingBatcher(Gate().run, scheduler, EngineThread())
    decoding: Future[DecodedImage] = Future()
    task = asyncio.create_task(batcher.submit(decoding, named(SMALL)))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait((task,))
    decoding.cancel()
    assert not caplog.records


class Turns:
    """Idle work that counts its turns and records the batches of requests."""

    running = None

    def __init__(self) -> None:
        self.is_closed = False
        self.taken = threading.Semaphore(0)
        self.looks: queue.SimpleQueue[bool] = queue.SimpleQueue()  # whether a request is on its way
        self.batches: list[tuple[SubNetwork, list[int]]] = []

    def wait_s(self, *, is_expecting: bool) -> float | None:
        self.looks.put(is_expecting)
        return 0.001

    def take_turn(self) -> None:
        self.taken.release()

    def close(self) -> None:
        self.is_closed = True

    def batch_ran(self, images: Sequence[Tensor], results: Sequence[Result]) -> None:
        pixels = [int(image[0, 0, 0]) for image in images]
        assert [result.logits[0] for result in results] == pixels
        self.batches.append((results[0].variant.profile.subnetwork, pixels))


async def test_an_idle_engine_takes_idle_turns_but_none_while_an_image_is_decoded() -> None:
    gate, turns, thread = Gate(), Turns(), EngineThread()
    gate.open.set()
    scheduler = Scheduler(CATALOG, choose_level, 4, rejects_early=False, lock=threading.RLock())
    batcher = AdmittingBatcher(gate.run, scheduler, thread, idle=turns)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.serve())
        assert await asyncio.to_thread(turns.taken.acquire, timeout=10)
        decoding: Future[DecodedImage] = Future()
        answer = tasks.create_task(batcher.submit(decoding, named(SMALL)))
        await asyncio.sleep(0)
        while not await asyncio.to_thread(turns.looks.get, timeout=10):
            pass
        while turns.taken.acquire(blocking=False):
            pass  # one may have begun before
        for _ in range(5):
            assert await asyncio.to_thread(turns.looks.get, timeout=10)
        assert not turns.taken.acquire(blocking=False)
        decoding.set_result(image(1).result())
        await answer
        assert await asyncio.to_thread(turns.taken.acquire, timeout=10)
        batcher.stop()
    thread.shutdown(wait=True)
    assert turns.batches == [(SMALL, [1])]
    assert turns.is_closed


class Halting(UtilizationLimiter):
    """A limiter that demands a pause of an hour."""

    def __init__(self) -> None:
        super().__init__(None, None)
        self.asked = threading.Event()

    def pause_s(self, now: float) -> float:
        del now
        self.asked.set()
        return 3600.0


async def test_a_request_gets_an_error_at_its_deadline_although_the_engine_pauses() -> None:
    naps: list[float] = []
    scheduler, thread, limiter = Scheduler(CATALOG, choose_level, 4, lock=threading.RLock()), EngineThread(), Halting()
    batcher = Batcher(Gate().run, scheduler, thread, limiter=limiter, sleep=naps.append)
    serving_it = asyncio.create_task(batcher.serve())
    request = named(SMALL, 0.05)
    scheduler.admit(request, time.monotonic())
    with pytest.raises(DeadlineError, match="the deadline passed before the engine was free"):
        await batcher.submit(image(1), request)
    scheduler.withdraw(request)
    assert limiter.asked.is_set()
    assert set(naps) == {LONGEST_NAP_S}
    assert scheduler.free_at > time.monotonic() + 3000, "admission knows of the pause"
    batcher.stop()
    await serving_it
    thread.shutdown(wait=True)
