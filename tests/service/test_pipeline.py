import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from models.evaluation.calibration import Scaling
from models.latency import LatencyTable
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from service.decoding.decoder import Decoder
from service.domain import ApiKey, Classification, InferenceRequest, ReasonCode
from service.errors import (
    BudgetTooSmallError,
    ClientGoneError,
    DeadlineError,
    InvalidParameterError,
    ModelError,
    OverloadedError,
    ServiceError,
)
from service.execution.batcher import Batcher
from service.execution.engine_thread import EngineThread
from service.pipeline import Pipeline, Read
from service.scheduling.catalog import VariantCatalog
from service.scheduling.estimators import REJECTION_COST, UPDATE_EVERY
from service.scheduling.key_ledger import KeyLedger
from service.scheduling.level_policy import choose_level
from service.scheduling.scheduler import RESERVATION_TIMEOUT_S, Scheduler
from service.scheduling.state import QueuedRequest
from service.telemetry.metrics import Metrics
from service.telemetry.outcomes import counted
from tests.service.conftest import opening, stand_in

pytestmark = pytest.mark.anyio


def wanted(
    budget_ms: float | None = 600_000, budget_gflops: float | None = None, **changes: float | str | SubNetwork
) -> InferenceRequest:
    return replace(InferenceRequest(time.monotonic(), budget_ms, budget_gflops, top_k=2), **changes)  # type: ignore[arg-type] # the names are those of the attributes


class Parts:
    """The stages below the pipeline; decoding and inference wait at their gates."""

    def __init__(self) -> None:
        self.decode_gate, self.model_gate = threading.Event(), threading.Event()
        self.threads: set[str] = set()
        self.decoding, self.running = threading.Event(), threading.Event()
        self.decodes = self.runs = 0
        self.logits = torch.eye(3)
        self.registry = CollectorRegistry()
        self.ledger = KeyLedger(1e-6)

    def open(self) -> "Parts":
        self.decode_gate.set()
        self.model_gate.set()
        return self

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"supervit_{name}", labels) or 0.0

    def decode(self, data: bytes) -> Tensor:
        self.decodes += 1
        self.threads.add(threading.current_thread().name)
        self.decoding.set()
        self.decode_gate.wait(10)
        return torch.full((3, 2, 2), len(data), dtype=torch.uint8)

    def run(self, images: Tensor, _: SubNetwork) -> Tensor:
        self.threads.add(threading.current_thread().name)
        self.running.set()
        self.model_gate.wait(10)
        self.runs += 1
        return self.logits[images[:, 0, 0, 0].long() % 3]


class Client(AbstractContextManager["Client"]):
    """A client that may leave; it tells the pipeline as the watch of a connection does."""

    def __init__(self) -> None:
        self._has_left = False
        self._task: asyncio.Task[object] | None = None

    def __enter__(self) -> "Client":
        self._task = asyncio.current_task()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, asyncio.CancelledError) and self._has_left and self._task:
            self._task.uncancel()
            raise ClientGoneError("it has left")

    def leave(self) -> None:
        self._has_left = True
        if self._task:
            self._task.cancel()


class CountedPipeline(Pipeline):
    """A pipeline that counts its requests, as the route does."""

    def __init__(self, parts: Parts, *, scheduler: Scheduler, **options: Any) -> None:  # noqa: ANN401 - options of the pipeline
        super().__init__(scheduler=scheduler, ledger=parts.ledger, **options)
        self.scheduler = scheduler
        self._metrics = Metrics(parts.registry)

    def reserve(self, request: InferenceRequest) -> QueuedRequest:
        reserved = super().reserve(request)
        assert reserved is not None, "no place is kept only for a key with a rate of work"
        return reserved

    async def classify(
        self,
        read: Read,
        request: InferenceRequest,
        watch: AbstractContextManager[object] | None = None,
        reserved: QueuedRequest | None = None,
    ) -> Classification:
        with counted(self._metrics) as record:
            answer = await super().classify(read, request, watch, reserved)
            record(answer)
        return answer


@asynccontextmanager
async def running(
    parts: Parts,
    profiles: ProfileTable,
    max_in_flight: int = 8,
    seconds: tuple[float, float] = (0.001, 0.002),
    clock: Callable[[], float] = time.monotonic,
    loop_time: Callable[[], float] = lambda: 0.0,
    decoder: Decoder | None = None,
) -> AsyncIterator["CountedPipeline"]:
    latencies = LatencyTable((1, 4), dict.fromkeys(profiles.by_subnetwork, seconds))
    scheduler = Scheduler(VariantCatalog.of(profiles, latencies), choose_level, 4, lock=threading.RLock())
    thread = EngineThread()
    decoder = decoder or Decoder(opening(parts.decode), 1, 0, clock=clock)
    batcher = Batcher(parts.run, scheduler, thread, clock=clock)
    pipeline = CountedPipeline(
        parts,
        scheduler=scheduler,
        checkpoint=stand_in("a", "b", "c"),
        decoder=decoder,
        batcher=batcher,
        max_in_flight=max_in_flight,
        default_budget_ms=60_000,
        clock=clock,
        loop_time=loop_time,
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.serve())
        yield pipeline
        batcher.stop()
    thread.shutdown(wait=True)
    decoder.close()
    assert scheduler.backlog_s(time.monotonic()) == 0.0, "a request is left in the scheduler"
    assert parts.count("requests_in_flight") == 0.0


async def two_bytes(_: float) -> bytes:
    return b"xx"


async def never(_: float) -> bytes:
    raise AssertionError("the body was read")


async def test_decode_time_counts_towards_the_bound_of_its_address(profiles: ProfileTable) -> None:
    parts = Parts()
    decoder = Decoder(opening(parts.decode, 1.0), 2, 0, 1.5)  # each image costs 1 s
    async with running(parts, profiles, decoder=decoder) as pipeline:
        first = asyncio.create_task(pipeline.classify(two_bytes, wanted(address="1.2.3.4")))
        assert await asyncio.to_thread(parts.decoding.wait, 10)
        other = asyncio.create_task(pipeline.classify(two_bytes, wanted(address="5.6.7.8")))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="of this address"):
            await pipeline.classify(two_bytes, wanted(address="1.2.3.4"))
        parts.open()
        await asyncio.gather(first, other)


async def test_decoding_and_inference_do_not_block_the_event_loop(profiles: ProfileTable) -> None:
    parts = Parts()
    async with running(parts, profiles) as pipeline:
        request = asyncio.create_task(pipeline.classify(two_bytes, wanted()))
        for gate in (parts.decode_gate, parts.model_gate):
            for _ in range(100):
                await asyncio.sleep(0)  # would never return if a stage blocked the loop
            assert not request.done()
            gate.set()
        answer = await request
    assert [prediction.label for prediction in answer.predictions] == ["c", "a"]
    assert parts.threads == {"decode_0", "engine_0"}


async def test_requests_beyond_max_in_flight_are_rejected_before_their_bodies_are_read(profiles: ProfileTable) -> None:
    parts = Parts()
    reads = 0

    async def read(_: float) -> bytes:
        nonlocal reads
        reads += 1
        return b"xx"

    async with running(parts, profiles, max_in_flight=2) as pipeline:
        admitted = [asyncio.create_task(pipeline.classify(read, wanted())) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="2 requests are in the server"):
            await pipeline.classify(read, wanted())
        assert reads == 2
        parts.decode_gate.set()
        parts.model_gate.set()
        assert len(await asyncio.gather(*admitted)) == 2
        assert await pipeline.classify(read, wanted())


async def test_a_request_holds_no_slot_while_its_body_arrives(profiles: ProfileTable) -> None:
    arrives = asyncio.Event()

    async def drip(_: float) -> bytes:
        await arrives.wait()
        return b"xx"

    parts = Parts()
    async with running(parts, profiles, max_in_flight=1) as pipeline:
        early, late = [asyncio.create_task(pipeline.classify(drip, wanted())) for _ in range(2)]
        await asyncio.sleep(0)
        pipeline.check_room()
        arrives.set()
        with pytest.raises(OverloadedError, match="1 requests are in the server"):
            await late
        with pytest.raises(OverloadedError):
            pipeline.check_room()
        parts.open()
        assert await early
        pipeline.check_room()


async def test_the_wait_for_a_decode_thread_is_reported_apart_from_the_queue_time(profiles: ProfileTable) -> None:
    parts, now = Parts(), 5.0
    parts.model_gate.set()
    async with running(parts, profiles, clock=lambda: now) as pipeline:
        request = InferenceRequest(now, 60_000)
        requests = [asyncio.create_task(pipeline.classify(two_bytes, request)) for _ in range(2)]
        await asyncio.to_thread(parts.decoding.wait, 10)
        now += 0.05
        parts.decode_gate.set()
        first, second = [(await one).timing for one in requests]
    assert (first.decode_wait_s, first.decode_s) == pytest.approx((0.0, 0.05))
    assert (second.decode_wait_s, second.decode_s) == pytest.approx((0.05, 0.0))
    assert first.queue_s == second.queue_s == pytest.approx(0.0)


async def test_a_request_cancelled_while_its_image_waits_is_never_decoded(profiles: ProfileTable) -> None:
    parts = Parts()
    parts.model_gate.set()
    async with running(parts, profiles) as pipeline:
        staying, leaving = [asyncio.create_task(pipeline.classify(two_bytes, wanted())) for _ in range(2)]
        await asyncio.to_thread(parts.decoding.wait, 10)
        leaving.cancel()
        await asyncio.wait((leaving,))
        parts.decode_gate.set()
        await staying
    assert parts.decodes == 1


@pytest.mark.parametrize(("after_s", "missed"), [(0.0, 0), (0.2, 1)])
async def test_a_client_that_leaves_after_its_deadline_counts_as_a_missed_deadline(
    profiles: ProfileTable, after_s: float, missed: int
) -> None:
    parts, client, now = Parts(), Client(), 1000.0
    parts.decode_gate.set()
    async with running(parts, profiles, clock=lambda: now) as pipeline:
        request = InferenceRequest(now, 100)
        leaving = asyncio.create_task(pipeline.classify(two_bytes, request, client))
        await asyncio.to_thread(parts.running.wait, 10)
        now += after_s
        client.leave()
        with pytest.raises(ClientGoneError) as caught:
            await leaving
        assert caught.value.deadline_passed == bool(missed)
        assert parts.count("requests_total", outcome="client_gone") == 1
        assert parts.count("deadlines_total", result="missed") == missed
        assert (pipeline.scheduler.state(now).safety_factor > 1) == bool(missed)
        parts.open()


async def test_a_key_is_charged_for_a_cancelled_request_only_once_its_image_may_have_been_decoded(
    profiles: ProfileTable,
) -> None:
    parts, charged = Parts(), list[float]()
    parts.ledger = KeyLedger(0.25, observe=lambda _, gflops: charged.append(gflops))
    request = replace(wanted(), key=ApiKey("a"))

    async def hang(_: float) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError("it goes on")

    async with running(parts, profiles) as pipeline:
        for read in (hang, two_bytes):
            leaving = asyncio.create_task(pipeline.classify(read, request))
            for _ in range(10):
                await asyncio.sleep(0)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
        parts.open()
    assert charged == [0.0, 0.25]


async def test_a_request_cut_off_at_the_end_of_the_drain_does_not_count_as_a_client_that_left(
    profiles: ProfileTable,
) -> None:
    parts, client = Parts(), Client()
    async with running(parts, profiles) as pipeline:
        cut_off = asyncio.create_task(pipeline.classify(two_bytes, wanted(), Client()))
        leaving = asyncio.create_task(pipeline.classify(two_bytes, wanted(), client))
        await asyncio.to_thread(parts.decoding.wait, 10)
        cut_off.cancel()
        client.leave()
        await asyncio.wait((cut_off, leaving))
        parts.open()
    assert cut_off.cancelled()
    assert parts.count("requests_total", outcome="client_gone") == 1
    assert parts.count("requests_total", outcome="internal_error") == 1
    assert parts.count("deadlines_total", result="missed") == 1


async def test_a_body_must_arrive_within_what_is_left_of_the_latency_budget(profiles: ProfileTable) -> None:
    granted: list[float] = []

    async def read(within_s: float) -> bytes:
        granted.append(within_s)
        return b"xx"

    async with running(Parts().open(), profiles, clock=lambda: 5.0) as pipeline:
        await pipeline.classify(read, InferenceRequest(4.5, 1000))
    assert granted == [pytest.approx(0.5, abs=0.01)]


async def test_a_cost_budget_that_no_sub_network_fits_is_rejected_before_the_body_is_read(
    profiles: ProfileTable,
) -> None:
    parts = Parts()
    async with running(parts, profiles) as pipeline:
        with pytest.raises(BudgetTooSmallError):
            await pipeline.classify(never, wanted(budget_gflops=1e-12))
    assert parts.count("requests_total", outcome="budget_too_small") == 1


@pytest.mark.parametrize("seconds", [(0.0029504, 0.004), (0.0842, 0.1)])
async def test_a_latency_budget_that_no_sub_network_can_meet_is_rejected_with_the_shortest_that_one_can(
    profiles: ProfileTable, seconds: tuple[float, float]
) -> None:
    class AcceptedError(Exception):
        """The body of the request is read."""

    async def accept(_: float) -> bytes:
        raise AcceptedError

    async with running(Parts().open(), profiles, seconds=seconds, clock=lambda: 5.0) as pipeline:
        with pytest.raises(BudgetTooSmallError) as caught:
            await pipeline.classify(never, InferenceRequest(5.0, 1000 * seconds[0], top_k=2))
        (smallest_ms,) = caught.value.details.values()
        assert 1 < smallest_ms / (1000 * seconds[0]) < 1.2
        with pytest.raises(AcceptedError):
            await pipeline.classify(accept, InferenceRequest(5.0, smallest_ms, top_k=2))
        with pytest.raises(ServiceError):
            await pipeline.classify(never, InferenceRequest(5.0, smallest_ms - 0.002, top_k=2))


async def test_a_request_whose_deadline_passes_before_decoding_is_not_decoded(profiles: ProfileTable) -> None:
    parts, now = Parts(), 5.0
    parts.model_gate.set()

    async def slow(_: float) -> bytes:
        nonlocal now
        now += 0.03
        return b"xx"

    async with running(parts, profiles, clock=lambda: now) as pipeline:
        with pytest.raises(DeadlineError):
            await pipeline.classify(slow, InferenceRequest(now, 20))
        assert parts.decodes == 0


async def test_the_answer_reports_the_decision_its_reason_and_whether_the_deadline_was_met(
    profiles: ProfileTable,
) -> None:
    parts = Parts()
    parts.decode_gate.set()
    parts.model_gate.set()
    async with running(parts, profiles) as pipeline:
        free = await pipeline.classify(two_bytes, wanted())
        capped = await pipeline.classify(two_bytes, wanted(budget_gflops=profiles.cheapest.gflops))
    assert free.decision.profile is profiles.frontier[-1]
    assert (free.deadline_met, free.accuracy_loss, free.saved_gflops) == (True, 0.0, 0.0)
    assert capped.decision.profile is profiles.cheapest
    assert (free.decision.code, capped.decision.code) == (ReasonCode.ALONE, ReasonCode.GFLOPS_BUDGET)
    assert capped.accuracy_loss == pytest.approx(0.3)
    assert capped.saved_gflops > 0


@pytest.mark.parametrize("budget_ms", [1e-9, 0.0, -5.0, float("nan"), float("-inf")])
async def test_a_meaningless_latency_budget_is_rejected_and_affects_no_other_request(
    profiles: ProfileTable, budget_ms: float
) -> None:
    async with running(Parts().open(), profiles) as pipeline:
        before = pipeline.decide(wanted())
        for _ in range(50):
            with pytest.raises(BudgetTooSmallError):
                await pipeline.classify(never, wanted(budget_ms))
        assert pipeline.decide(wanted()) == before
        assert (await pipeline.classify(two_bytes, wanted(1e9))).deadline_met


async def test_a_request_without_a_latency_budget_gets_the_servers_default(profiles: ProfileTable) -> None:
    async with running(Parts().open(), profiles) as pipeline:
        answer = await pipeline.classify(two_bytes, wanted(budget_ms=None))
    assert answer.budget_s == 60.0
    assert answer.decision.profile is profiles.frontier[-1]
    assert answer.decision.code is ReasonCode.ALONE


async def test_the_time_that_a_client_waits_bounds_its_latency_budget(profiles: ProfileTable) -> None:
    async with running(Parts().open(), profiles) as pipeline:
        default = await pipeline.classify(two_bytes, wanted(budget_ms=None, client_waits_s=20.0))
        patient = await pipeline.classify(two_bytes, wanted(budget_ms=30_000, client_waits_s=120.0))
    assert (default.budget_s, patient.budget_s) == (20.0, 30.0)


async def test_a_client_that_waits_too_briefly_gets_a_deadline_error_instead_of_a_budget_error(
    profiles: ProfileTable,
) -> None:
    async with running(Parts(), profiles) as pipeline:
        with pytest.raises(DeadlineError, match="even on an idle machine"):
            await pipeline.classify(never, wanted(client_waits_s=1e-9))


async def test_a_request_that_cannot_meet_its_deadline_is_rejected_before_its_body_is_read(
    profiles: ProfileTable,
) -> None:
    parts = Parts()
    parts.decode_gate.set()
    request = InferenceRequest(5.0, budget_ms=1750)
    async with running(parts, profiles, seconds=(1.0, 1.2), clock=lambda: 5.0) as pipeline:
        admitted = asyncio.create_task(pipeline.classify(two_bytes, request))
        await asyncio.to_thread(parts.running.wait, 10)
        # The running batch ends after 1 s, this request would after 2 s, and 3 ms of its budget are for the transport.
        with pytest.raises(OverloadedError) as caught:
            await pipeline.classify(never, request)
        assert caught.value.details == {"reason": "backlog", "retry_after_s": 0.253}
        parts.model_gate.set()
        await admitted
    assert parts.count("requests_total", outcome="overloaded") == 1
    assert parts.count("deadlines_total", result="missed") == 1


async def test_a_top_k_above_the_number_of_classes_is_rejected_before_the_body_is_read(profiles: ProfileTable) -> None:
    async with running(Parts(), profiles) as pipeline:
        with pytest.raises(InvalidParameterError, match="has only 3 classes"):
            await pipeline.classify(never, wanted(top_k=4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
async def test_logits_that_are_not_finite_are_a_model_error(profiles: ProfileTable, value: float) -> None:
    parts = Parts().open()
    parts.logits = torch.full((3, 3), value)
    async with running(parts, profiles) as pipeline:
        with pytest.raises(ModelError, match="is not finite"):
            await pipeline.classify(two_bytes, wanted())
    assert parts.count("requests_total", outcome="model_error") == 1


async def test_probabilities_are_the_softmax_of_the_logits_with_the_best_first(profiles: ProfileTable) -> None:
    parts = Parts().open()
    parts.logits = torch.tensor([[1000.0, -1000.0, 1000.0 + 1.0]]).repeat(3, 1)
    async with running(parts, profiles) as pipeline:
        answer = await pipeline.classify(two_bytes, wanted(top_k=3))
    assert [prediction.label for prediction in answer.predictions] == ["c", "a", "b"]
    assert [prediction.probability for prediction in answer.predictions] == pytest.approx(
        [0.731059, 0.268941, 0.0], abs=1e-6
    )


async def test_probabilities_use_the_temperature_of_the_sub_network_that_ran() -> None:
    hot, cold = SubNetwork(4, 0.5), SubNetwork(4, 1.0)
    profiles = ProfileTable(
        (SubNetworkProfile(hot, 10, 0.7, temperature=2.0), SubNetworkProfile(cold, 20, 0.8, temperature=0.5))
    )
    parts = Parts().open()
    parts.logits = torch.tensor([[0.0, math.log(9), -1000.0]]).repeat(3, 1)
    async with running(parts, profiles) as pipeline:
        for subnetwork, expected in ((hot, 3 / 4), (cold, 81 / 82)):
            answer = await pipeline.classify(two_bytes, wanted(top_k=3, subnetwork=subnetwork))
            assert [prediction.label for prediction in answer.predictions] == ["b", "a", "c"]
            assert answer.predictions[0].probability == pytest.approx(expected)


@pytest.mark.parametrize("logits", [[0.0, 3.0, -1000.0], [2.0, 2.5, 1.0], [0.0, 1000.0, 0.0], [0.0, 3e38, -3e38]])
async def test_probabilities_are_scaled_as_in_calibration(logits: list[float]) -> None:
    subnetwork = SubNetwork(4, 1.0)
    row = SubNetworkProfile(subnetwork, 10, 0.7, temperature=1.2, entropy_exponent=0.4)
    parts = Parts().open()
    parts.logits = torch.tensor([logits]).repeat(3, 1)
    async with running(parts, ProfileTable((row,))) as pipeline:
        answer = await pipeline.classify(two_bytes, wanted(top_k=3, subnetwork=subnetwork))
    expected = Scaling(1.2, 0.4).probabilities(torch.tensor([logits]))[0].sort(descending=True).values
    assert [prediction.probability for prediction in answer.predictions] == pytest.approx(expected.tolist(), abs=1e-6)


async def test_a_sub_network_by_name_that_costs_more_than_the_best_runs_and_saves_nothing() -> None:
    good, expensive = SubNetwork(4, 0.5), SubNetwork(4, 1.0)
    profiles = ProfileTable((SubNetworkProfile(good, 10, 0.7), SubNetworkProfile(expensive, 20, 0.6)))
    async with running(Parts().open(), profiles) as pipeline:
        answer = await pipeline.classify(two_bytes, wanted(subnetwork=expensive))
    assert answer.decision.profile.subnetwork == expensive
    assert answer.accuracy_loss == pytest.approx(0.1)
    assert answer.saved_gflops == 0.0


async def test_a_forecast_runs_nothing_and_matches_the_decision_that_follows(profiles: ProfileTable) -> None:
    parts = Parts().open()
    async with running(parts, profiles) as pipeline:
        for request in (
            wanted(),
            wanted(budget_gflops=profiles.cheapest.gflops),
            wanted(subnetwork=SubNetwork(2, 1.0)),
        ):
            forecast = pipeline.decide(request)
            runs = parts.runs
            answer = await pipeline.classify(two_bytes, replace(request, arrived_at=time.monotonic()))
            assert parts.runs == runs + 1
            assert forecast.decision.profile is answer.decision.profile
            assert forecast.decision.reason == answer.decision.reason
            assert forecast.answered_in_s < 1
        with pytest.raises(ServiceError):
            pipeline.decide(wanted(budget_gflops=1e-12))
    assert parts.decodes == 3


async def test_a_request_is_dropped_at_any_stage_once_its_client_leaves(profiles: ProfileTable) -> None:
    parts = Parts()

    async def forever(_: float) -> bytes:
        await asyncio.Event().wait()
        return b""

    async with running(parts, profiles) as pipeline:
        clients = [Client() for _ in range(4)]
        uploading = asyncio.create_task(pipeline.classify(forever, wanted(), clients[0]))
        decoding = asyncio.create_task(pipeline.classify(two_bytes, wanted(), clients[1]))
        await asyncio.to_thread(parts.decoding.wait, 10)
        for client in clients[:2]:
            client.leave()
        await asyncio.wait((uploading, decoding))
        parts.decode_gate.set()
        in_engine = asyncio.create_task(pipeline.classify(two_bytes, wanted(), clients[2]))
        await asyncio.to_thread(parts.running.wait, 10)
        queued = asyncio.create_task(pipeline.classify(two_bytes, wanted(), clients[3]))
        while not len(pipeline.scheduler):  # noqa: ASYNC110 - the scheduler has no event for this
            await asyncio.sleep(0)
        for client in clients[2:]:
            client.leave()
        await asyncio.wait((queued, in_engine))
        parts.model_gate.set()
    assert parts.runs == 1
    assert parts.count("requests_total", outcome="client_gone") == 4


class BusyLoop:
    """The CPU time of an event loop in which every request that is read takes 4 s."""

    def __init__(self) -> None:
        self.spent_s = 0.0

    async def read(self, _: float) -> bytes:
        self.spent_s += 4.0
        return b"xx"

    def __call__(self) -> float:
        return self.spent_s


def reject_early(pipeline: Pipeline, loop: BusyLoop) -> None:
    loop.spent_s += 4.0 * REJECTION_COST
    with pytest.raises(OverloadedError):
        pipeline.reserve(InferenceRequest(5.0, budget_ms=2))


async def test_admission_learns_from_cheap_rejections_that_the_event_loop_is_no_longer_busy(
    profiles: ProfileTable,
) -> None:
    loop, request = BusyLoop(), InferenceRequest(5.0, budget_ms=1000)
    async with running(Parts().open(), profiles, clock=lambda: 5.0, loop_time=loop) as pipeline:
        for _ in range(3 * UPDATE_EVERY):
            await pipeline.classify(loop.read, replace(request, budget_ms=60_000))
        for _ in range(3 * UPDATE_EVERY):
            with pytest.raises(OverloadedError):
                await pipeline.classify(never, replace(request, budget_ms=2))
        assert await pipeline.classify(two_bytes, request)  # the rejections took almost no time of the loop


async def test_a_request_that_a_busy_event_loop_would_answer_too_late_is_rejected(profiles: ProfileTable) -> None:
    loop = BusyLoop()
    async with running(Parts().open(), profiles, clock=lambda: 5.0, loop_time=loop) as pipeline:
        for _ in range(3 * UPDATE_EVERY):
            await pipeline.classify(loop.read, InferenceRequest(5.0, 60_000))
        with pytest.raises(OverloadedError):
            await pipeline.classify(never, InferenceRequest(5.0, 1000))


async def test_a_pipeline_that_takes_over_inherits_the_event_loop_cost_and_the_arrival_rate(
    profiles: ProfileTable,
) -> None:
    loop, clock = BusyLoop(), lambda: 5.0
    async with (
        running(Parts().open(), profiles, clock=clock, loop_time=loop) as before,
        running(Parts().open(), profiles, clock=clock) as after,
    ):
        for _ in range(3 * UPDATE_EVERY):
            await before.classify(loop.read, InferenceRequest(5.0, 60_000))
        after.take_over(before)
        assert after.scheduler.state(5.0).arrival_rate == before.scheduler.state(5.0).arrival_rate > 0
        with pytest.raises(OverloadedError):
            await after.classify(never, InferenceRequest(5.0, 1000))


async def test_an_early_rejection_counts_as_a_tenth_of_a_request_in_the_event_loop_cost(profiles: ProfileTable) -> None:
    """A server that put the cost of its rejections on other requests would reject more, the more it rejects."""
    loop, request, parts = BusyLoop(), InferenceRequest(5.0, 60_000), Parts().open()
    async with running(parts, profiles, clock=lambda: 5.0, loop_time=loop) as pipeline:
        for _ in range(3 * UPDATE_EVERY):
            await pipeline.classify(loop.read, request)
        parts.decode_gate.clear()
        waiting = asyncio.create_task(pipeline.classify(two_bytes, replace(request, budget_ms=3000)))
        await asyncio.sleep(0)
        for _ in range(12 * UPDATE_EVERY):
            reject_early(pipeline, loop)
        with pytest.raises(OverloadedError):
            pipeline.reserve(replace(request, budget_ms=3500))
        pipeline.scheduler.withdraw(pipeline.reserve(replace(request, budget_ms=4500)))
        parts.open()
        await waiting


async def test_requests_served_later_add_no_event_loop_delay_to_an_urgent_request(profiles: ProfileTable) -> None:
    """Many clients with large images and long budgets or low priority keep no urgent request out."""
    loop, parts = BusyLoop(), Parts().open()
    async with running(parts, profiles, max_in_flight=99, clock=lambda: 5.0, loop_time=loop) as pipeline:
        for _ in range(3 * UPDATE_EVERY):
            await pipeline.classify(loop.read, InferenceRequest(5.0, 60_000))
        parts.decode_gate.clear()
        later = [InferenceRequest(5.0, 900_000), InferenceRequest(5.0, 2200, priority=-1)]
        waiting = [asyncio.create_task(pipeline.classify(two_bytes, request)) for request in later * 10]
        await asyncio.sleep(0)
        pipeline.scheduler.withdraw(pipeline.reserve(InferenceRequest(5.0, 2500)))
        parts.open()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_rejections_by_an_idle_server_do_not_change_the_event_loop_cost(profiles: ProfileTable) -> None:
    loop, request = BusyLoop(), InferenceRequest(5.0, 60_000)
    async with running(Parts().open(), profiles, clock=lambda: 5.0, loop_time=loop) as pipeline:
        for turn in range(3):
            for _ in range(3 * UPDATE_EVERY):
                await pipeline.classify(loop.read, request)
            for _ in range(20 * UPDATE_EVERY * turn):
                reject_early(pipeline, loop)
            with pytest.raises(OverloadedError):
                pipeline.reserve(replace(request, budget_ms=1500))
            pipeline.scheduler.withdraw(pipeline.reserve(replace(request, budget_ms=2500)))


async def test_a_reserved_place_does_not_delay_its_own_request(profiles: ProfileTable) -> None:
    loop = BusyLoop()
    async with running(Parts().open(), profiles, clock=lambda: 5.0, loop_time=loop) as pipeline:
        for _ in range(3 * UPDATE_EVERY):
            await pipeline.classify(loop.read, InferenceRequest(5.0, 60_000))
        request = InferenceRequest(5.0, 2500)  # half of the 4 s pass before it is decoded
        assert await pipeline.classify(two_bytes, request, reserved=pipeline.reserve(request))


async def test_a_request_for_too_many_predictions_reserves_no_place(profiles: ProfileTable) -> None:
    async with running(Parts(), profiles) as pipeline:
        with pytest.raises(InvalidParameterError):
            pipeline.reserve(wanted(top_k=4))
        assert pipeline.scheduler.backlog_s(time.monotonic()) == 0


async def test_a_reserved_place_expires_if_its_body_does_not_arrive(profiles: ProfileTable) -> None:
    loop, now = BusyLoop(), 5.0
    async with running(Parts().open(), profiles, clock=lambda: now, loop_time=loop) as pipeline:
        for _ in range(3 * UPDATE_EVERY):
            await pipeline.classify(loop.read, InferenceRequest(now, 60_000))
        for _ in range(10):
            pipeline.reserve(InferenceRequest(now, 60_000))
        for ask in (pipeline.decide, pipeline.reserve):
            with pytest.raises(OverloadedError):
                ask(InferenceRequest(now, 6000))
        now += RESERVATION_TIMEOUT_S
        assert pipeline.decide(InferenceRequest(now, 6000))
        assert await pipeline.classify(two_bytes, InferenceRequest(now, 6000))


async def test_a_reserved_place_is_claimed_by_its_request(profiles: ProfileTable) -> None:
    parts = Parts()
    async with running(parts, profiles) as pipeline:
        reserved = pipeline.reserve(wanted())
        one_s = pipeline.scheduler.backlog_s(time.monotonic())
        request = asyncio.create_task(pipeline.classify(two_bytes, wanted(), reserved=reserved))
        await asyncio.to_thread(parts.decoding.wait, 10)
        assert pipeline.scheduler.num_before(reserved, time.monotonic())[1] == 0
        assert pipeline.scheduler.backlog_s(time.monotonic()) == pytest.approx(one_s)
        parts.open()
        await request


async def test_event_loop_time_between_requests_is_charged_to_no_request(profiles: ProfileTable) -> None:
    loop = BusyLoop()
    async with running(Parts().open(), profiles, clock=lambda: 5.0, loop_time=loop) as pipeline:
        for _ in range(3 * UPDATE_EVERY):
            loop.spent_s += 4.0  # of the monitor and the health checks, between rare requests
            assert await pipeline.classify(two_bytes, InferenceRequest(5.0, 1000))


async def test_admission_accounts_for_images_that_wait_to_be_decoded(profiles: ProfileTable) -> None:
    now = 1000.0

    class SlowParts(Parts):
        def decode(self, data: bytes) -> Tensor:
            nonlocal now
            image = super().decode(data)
            now += 1.0
            return image

    parts = SlowParts().open()
    async with running(parts, profiles, clock=lambda: now) as pipeline:
        for _ in range(40):
            await pipeline.classify(two_bytes, InferenceRequest(now, 60_000))
            await asyncio.sleep(0)  # the time of the reply is measured before the next image lets time pass
        parts.decode_gate.clear()
        decoding = [asyncio.create_task(pipeline.classify(two_bytes, InferenceRequest(now, 4500))) for _ in range(4)]
        while parts.decodes < 41:  # noqa: ASYNC110 - another thread counts
            await asyncio.sleep(0)
        forecast = pipeline.decide(InferenceRequest(now, 60_000))
        assert forecast.answered_in_s == pytest.approx(5.0, abs=0.2)
        urgent = pipeline.decide(InferenceRequest(now, 2500))
        assert urgent.answered_in_s == pytest.approx(2.0, abs=0.2), "only the image that is being decoded is before it"
        with pytest.raises(OverloadedError) as caught:  # four images are due before it, and its own takes 1 s
            await pipeline.classify(never, InferenceRequest(now, 4600))
        assert caught.value.reason == "preprocessing"
        assert pipeline.scheduler.state(now).safety_factor == 1.0, "a cheaper level would decode no faster"
        assert caught.value.details["retry_after_s"] == pytest.approx(0.4, abs=0.2)
        parts.decode_gate.set()
        await asyncio.gather(*decoding)
        assert await pipeline.classify(two_bytes, InferenceRequest(now, 4000))  # too short before they were decoded


async def test_rejections_after_slow_decoding_end_with_time(profiles: ProfileTable) -> None:
    now = 1000.0

    class SlowParts(Parts):
        def decode(self, data: bytes) -> Tensor:
            nonlocal now
            now += len(data)  # one second per byte
            return super().decode(data)

    async def empty(_: float) -> bytes:
        return b""

    async with running(SlowParts().open(), profiles, clock=lambda: now) as pipeline:
        for _ in range(20):
            await pipeline.classify(two_bytes, InferenceRequest(now, 60_000))
        with pytest.raises(OverloadedError):
            await pipeline.classify(never, InferenceRequest(now, 500))
        now += 30.0
        assert await pipeline.classify(empty, InferenceRequest(now, 500))


async def test_slow_decoding_is_learned_from_the_requests_that_it_makes_late(profiles: ProfileTable) -> None:
    now = 1000.0

    class SlowParts(Parts):
        def decode(self, data: bytes) -> Tensor:
            nonlocal now
            now += 1.0
            return super().decode(data)

    async with running(SlowParts().open(), profiles, clock=lambda: now) as pipeline:
        outcomes: list[type[BaseException]] = []
        while len(outcomes) < 20 and OverloadedError not in outcomes:
            with pytest.raises((DeadlineError, OverloadedError)) as caught:
                await pipeline.classify(two_bytes, InferenceRequest(now, 500))
            outcomes.append(caught.type)
    assert outcomes[0] is DeadlineError
    assert outcomes[-1] is OverloadedError, "a request that would be decoded in vain is rejected early"
