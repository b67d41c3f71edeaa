import asyncio
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from models.latency import LatencyTable
from models.profiles import ProfileTable
from models.subnetwork import SubNetwork
from service.batcher import Batcher
from service.domain import InferenceRequest
from service.errors import BudgetTooSmallError, DeadlineError, NotReadyError, OverloadedError
from service.line import Line
from service.menu import Menu
from service.metrics import Metrics
from service.pipeline import Pipeline
from service.policy import choose_level

pytestmark = pytest.mark.anyio


def wish(budget_ms: float = 60_000, **changes: float) -> InferenceRequest:
    return InferenceRequest(time.monotonic(), budget_ms, changes.get("budget_gflops"), top_k=2)


class Parts:
    """The stages below the pipeline; decode and model wait at their gates."""

    def __init__(self) -> None:
        self.decode_gate, self.model_gate = threading.Event(), threading.Event()
        self.threads: set[str] = set()
        self.decodes = 0

    def decode(self, data: bytes) -> Tensor:
        self.decodes += 1
        self.threads.add(threading.current_thread().name)
        self.decode_gate.wait(10)
        return torch.full((3, 2, 2), len(data), dtype=torch.uint8)

    def run(self, images: Tensor, _: SubNetwork) -> Tensor:
        self.threads.add(threading.current_thread().name)
        self.model_gate.wait(10)
        return torch.eye(3)[images[:, 0, 0, 0].long() % 3]


@asynccontextmanager
async def running(parts: Parts, profiles: ProfileTable, max_in_flight: int = 8) -> AsyncIterator[Pipeline]:
    latencies = LatencyTable((1, 4), dict.fromkeys(profiles.by_subnetwork, (0.001, 0.002)))
    line = Line(Menu.of(profiles, latencies), choose_level, 4)
    thread = ThreadPoolExecutor(1, "engine")
    batcher = Batcher(parts.run, line, thread)
    pipeline = Pipeline(
        line=line,
        class_names=("a", "b", "c"),
        decode=parts.decode,
        decode_threads=ThreadPoolExecutor(1, "decode"),
        num_decode_threads=1,
        batcher=batcher,
        metrics=Metrics(CollectorRegistry()),
        max_in_flight=max_in_flight,
        default_budget_ms=60_000,
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.serve())
        pipeline.ready()
        yield pipeline
        batcher.stop()
    thread.shutdown()


async def two_bytes() -> bytes:
    return b"xx"


async def test_the_event_loop_goes_on_while_images_are_decoded_and_models_run(profiles: ProfileTable) -> None:
    parts = Parts()
    async with running(parts, profiles) as pipeline:
        request = asyncio.create_task(pipeline.classify(two_bytes, wish()))
        for gate in (parts.decode_gate, parts.model_gate):
            for _ in range(100):
                await asyncio.sleep(0)  # would never come back if a stage held the loop
            assert not request.done()
            gate.set()
        answer = await request
    assert [prediction.label for prediction in answer.predictions] == ["c", "a"]
    assert parts.threads == {"decode_0", "engine_0"}


async def test_more_than_the_limit_are_refused_before_their_bodies_are_read(profiles: ProfileTable) -> None:
    parts = Parts()
    reads = 0

    async def read() -> bytes:
        nonlocal reads
        reads += 1
        return b"xx"

    async with running(parts, profiles, max_in_flight=2) as pipeline:
        admitted = [asyncio.create_task(pipeline.classify(read, wish())) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="2 requests are in the server"):
            await pipeline.classify(read, wish())
        assert reads == 2
        parts.decode_gate.set()
        parts.model_gate.set()
        assert len(await asyncio.gather(*admitted)) == 2
        assert await pipeline.classify(read, wish())


async def test_waiting_for_a_decode_thread_is_time_in_the_queue(profiles: ProfileTable) -> None:
    parts = Parts()
    parts.model_gate.set()
    async with running(parts, profiles) as pipeline:
        requests = [asyncio.create_task(pipeline.classify(two_bytes, wish())) for _ in range(2)]
        await asyncio.sleep(0.05)
        parts.decode_gate.set()
        first, second = [(await request).timing for request in requests]
    assert first.queue_s < first.decode_s
    assert second.decode_s < second.queue_s


async def test_a_cancelled_request_leaves_the_line_before_the_decoder(profiles: ProfileTable) -> None:
    parts = Parts()
    parts.model_gate.set()
    async with running(parts, profiles) as pipeline:
        staying, leaving = [asyncio.create_task(pipeline.classify(two_bytes, wish())) for _ in range(2)]
        await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.wait((leaving,))
        parts.decode_gate.set()
        await staying
    assert parts.decodes == 1


async def test_a_hopeless_budget_is_refused_before_the_body_is_read(profiles: ProfileTable) -> None:
    async def read() -> bytes:
        raise AssertionError("read")

    async with running(Parts(), profiles) as pipeline:
        with pytest.raises(BudgetTooSmallError):
            await pipeline.classify(read, wish(budget_gflops=1e-12))


async def test_a_time_that_no_sub_network_can_meet_is_refused_with_the_shortest_that_one_can(
    profiles: ProfileTable,
) -> None:
    async with running(Parts(), profiles) as pipeline:
        with pytest.raises(BudgetTooSmallError) as caught:
            await pipeline.classify(two_bytes, wish(budget_ms=0.5))
        assert caught.value.details == {"smallest_budget_ms": 1.0}


async def test_a_deadline_that_passes_before_decoding_costs_no_decoding(profiles: ProfileTable) -> None:
    parts = Parts()
    parts.model_gate.set()

    async def slow() -> bytes:
        await asyncio.sleep(0.03)
        return b"xx"

    async with running(parts, profiles) as pipeline:
        with pytest.raises(DeadlineError):
            await pipeline.classify(slow, wish(budget_ms=20))
        assert parts.decodes == 0


async def test_the_answer_says_what_was_decided_why_and_whether_it_was_in_time(profiles: ProfileTable) -> None:
    parts = Parts()
    parts.decode_gate.set()
    parts.model_gate.set()
    async with running(parts, profiles) as pipeline:
        free = await pipeline.classify(two_bytes, wish())
        capped = await pipeline.classify(two_bytes, wish(budget_gflops=profiles.cheapest.gflops))
    assert free.decision.profile is profiles.frontier[-1]
    assert (free.deadline_met, free.given_up, free.saved_gflops) == (True, 0.0, 0.0)
    assert capped.decision.profile is profiles.cheapest
    assert "the next better one" in capped.decision.reason
    assert capped.given_up == pytest.approx(0.3)
    assert capped.saved_gflops > 0


async def test_while_it_drains_newcomers_are_refused_and_those_admitted_answered(profiles: ProfileTable) -> None:
    parts = Parts()
    async with running(parts, profiles) as pipeline:
        admitted = asyncio.create_task(pipeline.classify(two_bytes, wish()))
        await asyncio.sleep(0)
        pipeline.drain()
        with pytest.raises(NotReadyError):
            await pipeline.classify(two_bytes, wish())
        with pytest.raises(NotReadyError):
            pipeline.decide(wish())
        parts.decode_gate.set()
        parts.model_gate.set()
        assert await admitted
