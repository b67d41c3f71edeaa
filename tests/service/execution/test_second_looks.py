"""The batcher and the pipeline where a first look is unsure: which second look follows, and the answer without one.

The confidence of the hand-made model is the first pixel of an image, in hundredths, at the small sub-network, and
always 0.95 at the large one.
"""

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from models.latency import LatencyTable
from models.profiles import CascadeProfile, ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from service.decoding.decoder import Decoder
from service.domain import Classification, InferenceRequest, LookCode
from service.errors import ServiceError
from service.execution.batcher import Batcher
from service.execution.engine_thread import EngineThread
from service.pipeline import Pipeline
from service.scheduling.catalog import VariantCatalog
from service.scheduling.key_ledger import KeyLedger
from service.scheduling.level_policy import choose_level
from service.scheduling.scheduler import Scheduler
from service.scheduling.state import BatchDecision, Decide, SchedulerState
from tests.service.conftest import opening, stand_in

SMALL, LARGE = SubNetwork(2, 0.5), SubNetwork(4, 1.0)
PROFILES = ProfileTable(
    (SubNetworkProfile(SMALL, 1_000_000_000, 0.6), SubNetworkProfile(LARGE, 4_000_000_000, 0.8)),
    (CascadeProfile(SMALL, LARGE, threshold=0.8, share=0.5, top1=0.81),),
)
LATENCIES = LatencyTable((1, 4), {SMALL: (0.001, 0.002), LARGE: (0.002, 0.004)})

pytestmark = pytest.mark.anyio


class Model:
    """Answers class 0 at the small sub-network and class 1 at the large one; either may block or fail."""

    def __init__(self) -> None:
        self.ran: list[tuple[SubNetwork, int]] = []
        self.gates = {SMALL: threading.Event(), LARGE: threading.Event()}
        self.entered = {SMALL: threading.Event(), LARGE: threading.Event()}
        self.fails_at: SubNetwork | None = None
        self.answers_nan = False

    def open(self, *subnetworks: SubNetwork) -> "Model":
        for subnetwork in subnetworks or self.gates:
            self.gates[subnetwork].set()
        return self

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        self.entered[subnetwork].set()
        self.gates[subnetwork].wait(10)
        self.ran.append((subnetwork, len(images)))
        if subnetwork == self.fails_at:
            raise RuntimeError("no second look today")
        sure = images[:, 0, 0, 0] / 100 if subnetwork == SMALL else torch.full((len(images),), 0.95)
        if self.answers_nan and subnetwork == LARGE:
            sure = torch.full((len(images),), torch.nan)
        chosen = torch.log(sure / (1 - sure))
        rest = torch.zeros_like(chosen)
        return torch.stack([chosen, rest] if subnetwork == SMALL else [rest, chosen], dim=1)


class Parts(NamedTuple):
    """The pipeline and the parts of it that tests use."""

    pipeline: Pipeline
    scheduler: Scheduler
    batcher: Batcher


@asynccontextmanager
async def answering(
    model: Model, decide: Decide = choose_level, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[Parts]:
    catalog = VariantCatalog.of(PROFILES, LATENCIES)
    scheduler = Scheduler(catalog, decide, 4, rejects_early=False, lock=threading.RLock())
    thread = EngineThread()
    decoder = Decoder(opening(lambda data: torch.full((3, 2, 2), int(data), dtype=torch.uint8)), 1, 0)
    batcher = Batcher(model.run, scheduler, thread)
    pipeline = Pipeline(
        scheduler=scheduler,
        checkpoint=stand_in("at first sight", "at second sight"),
        decoder=decoder,
        batcher=batcher,
        max_in_flight=8,
        default_budget_ms=60_000,
        ledger=KeyLedger(1.0),
        clock=clock,
        loop_time=lambda: 0.0,
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.serve())
        try:
            yield Parts(pipeline, scheduler, batcher)
        finally:
            model.open()
            batcher.stop()
    thread.shutdown(wait=True)
    decoder.close()
    assert (len(scheduler), scheduler.backlog_s(time.monotonic())) == (0, 0.0)


async def queued(parts: Parts, number: int) -> None:
    """Wait until the decoder's thread has put this many requests into the queue."""
    while len(parts.scheduler) < number:  # noqa: ASYNC110 - the scheduler has no event for it
        await asyncio.sleep(0)


async def ask(parts: Parts, percent_sure: int, **changes: float | SubNetwork) -> Classification:
    async def read(_: float) -> bytes:
        return b"%d" % percent_sure

    request = replace(InferenceRequest(time.monotonic(), budget_ms=60_000), **changes)  # type: ignore[arg-type] # the keywords are attribute names
    return await parts.pipeline.classify(read, request)


def looks(answer: Classification) -> list[SubNetwork]:
    return [look.profile.subnetwork for look in answer.looks]


async def test_an_unsure_first_look_is_followed_by_a_second_look() -> None:
    model = Model().open()
    async with answering(model) as parts:
        sure, unsure = await ask(parts, 90), await ask(parts, 70)
    assert (looks(sure), sure.predictions[0].label, sure.gflops) == ([SMALL], "at first sight", 1.0)
    assert (looks(unsure), unsure.predictions[0].label, unsure.gflops) == ([SMALL, LARGE], "at second sight", 5.0)
    assert [round(look.confidence, 4) for look in unsure.looks] == [0.7, 0.95]
    assert unsure.decision.reason.endswith("; 70 % sure, so grid 4 at keep rate 1 looked again")
    assert (sure.stopped, unsure.stopped) == (LookCode.SURE, LookCode.SURE)
    assert (sure.expected_top1, unsure.expected_top1, unsure.accuracy_loss) == (0.81, 0.81, 0.0)
    assert (sure.saved_gflops, unsure.saved_gflops) == (3.0, 0.0)
    assert unsure.timing.inference_s == pytest.approx(sum(look.inference_s for look in unsure.looks))


async def test_only_the_unsure_images_of_a_batch_get_a_second_look() -> None:
    model = Model()
    async with answering(model) as parts:
        running = asyncio.create_task(ask(parts, 90))
        await asyncio.to_thread(model.entered[SMALL].wait, 10)
        others = [asyncio.create_task(ask(parts, percent)) for percent in (95, 50, 60)]
        await queued(parts, len(others))
        model.open()
        answers = await asyncio.gather(running, *others)
    assert [len(answer.looks) for answer in answers] == [1, 1, 2, 2]
    assert model.ran == [(SMALL, 1), (SMALL, 3), (LARGE, 2)]


async def test_a_second_look_that_does_not_end_in_time_leaves_the_first_answer_at_the_deadline() -> None:
    model, began_at = Model().open(SMALL), time.monotonic()

    def half_as_fast() -> float:  # so that a busy machine, with late timers, is in time
        return began_at + (time.monotonic() - began_at) / 2

    async with answering(model, clock=half_as_fast) as parts:
        answer = await ask(parts, 70, budget_ms=300.0)
    assert (looks(answer), answer.stopped) == ([SMALL], LookCode.DEADLINE)
    assert answer.deadline_met
    assert answer.decision.reason.endswith("; only 70 % sure, but there was no time for another look")
    assert answer.timing.queue_s > 0.1
    assert answer.expected_top1 == pytest.approx(0.81 - 0.21 / 0.5)
    assert answer.accuracy_loss == pytest.approx(0.42)


async def test_a_second_look_that_is_shed_leaves_the_first_answer() -> None:
    def impatient(state: SchedulerState) -> BatchDecision:
        again = tuple(request for request in state.queue if request.second_look_of is not None)
        return BatchDecision(None, shed=again) if again else choose_level(state)

    model = Model().open()
    async with answering(model, impatient) as parts:
        answer = await ask(parts, 70)
    assert (looks(answer), answer.predictions[0].label, answer.stopped) == (
        [SMALL],
        "at first sight",
        LookCode.OVERLOAD,
    )


async def test_a_second_look_that_fails_leaves_the_first_answer() -> None:
    model = Model().open()
    model.fails_at = LARGE
    async with answering(model) as parts:
        answer = await ask(parts, 70)
    assert (looks(answer), answer.stopped) == ([SMALL], LookCode.FAILED)
    assert "the model failed during another look" in answer.decision.reason


async def test_a_second_look_that_answers_nan_leaves_the_first_answer() -> None:
    model = Model().open()
    model.answers_nan = True
    async with answering(model) as parts:
        answer = await ask(parts, 70)
    assert (looks(answer), answer.stopped) == ([SMALL], LookCode.FAILED)
    assert answer.predictions[0].label == "at first sight"


async def test_a_request_whose_client_leaves_before_its_first_look_gets_no_look() -> None:
    model = Model()
    async with answering(model) as parts:
        blocking = asyncio.create_task(ask(parts, 90, subnetwork=LARGE))
        await asyncio.to_thread(model.entered[LARGE].wait, 10)
        leaving = asyncio.create_task(ask(parts, 70))
        await queued(parts, 1)
        model.open(SMALL)
        leaving.cancel()
        await asyncio.wait((leaving,))
        assert len(parts.scheduler) == 0
        model.open()
        await blocking
    assert model.ran == [(LARGE, 1)]


@pytest.mark.parametrize(
    ("min_confidence", "budget_gflops", "expected", "stopped"),
    [
        (0.92, None, [SMALL, LARGE], LookCode.SURE),
        (0.99, None, [SMALL, LARGE], LookCode.NONE_BETTER),
        (0.85, None, [SMALL], LookCode.SURE),
        (0.92, 1.5, [SMALL], LookCode.BUDGET),
        (0.92, 5.0, [SMALL, LARGE], LookCode.SURE),
    ],
)
async def test_a_minimum_confidence_decides_whether_a_second_look_follows(
    min_confidence: float, budget_gflops: float | None, expected: list[SubNetwork], stopped: LookCode
) -> None:
    async with answering(Model().open()) as parts:
        changes = {} if budget_gflops is None else {"budget_gflops": budget_gflops}
        answer = await ask(parts, 90, min_confidence=min_confidence, **changes)
    assert (looks(answer), answer.stopped) == (expected, stopped)
    assert answer.gflops <= (budget_gflops or math.inf)


async def test_a_decision_made_in_advance_includes_the_second_look_that_may_follow() -> None:
    async with answering(Model().open()) as parts:
        forecast = parts.pipeline.decide(InferenceRequest(time.monotonic(), budget_ms=60_000))
        by_name = parts.pipeline.decide(InferenceRequest(time.monotonic(), budget_ms=60_000, subnetwork=SMALL))
    planned = forecast.decision.second_look
    assert planned is not None
    assert (forecast.decision.profile.subnetwork, planned.profile.subnetwork) == (SMALL, LARGE)
    assert (planned.threshold, planned.share) == (0.8, 0.5)
    assert by_name.decision.second_look is None


async def test_an_abandoned_batcher_answers_with_the_first_look() -> None:
    model = Model().open(SMALL)
    async with answering(model) as parts:
        asked = asyncio.create_task(ask(parts, 70))
        await asyncio.to_thread(model.entered[LARGE].wait, 10)
        parts.batcher.abandon()
        answer = await asked
    assert (looks(answer), answer.stopped) == ([SMALL], LookCode.FAILED)


async def test_a_sub_network_by_name_looks_once_however_unsure_it_is() -> None:
    async with answering(Model().open()) as parts:
        answer = await ask(parts, 55, subnetwork=SMALL)
        with pytest.raises(ServiceError):
            await ask(parts, 55, budget_gflops=0.5)
    assert (looks(answer), answer.stopped) == ([SMALL], LookCode.SURE)
