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

from models.profiles import ProfileTable
from models.subnetwork import SubNetwork
from service.batcher import Batcher
from service.domain import InferenceRequest
from service.errors import BudgetTooSmallError, OverloadedError
from service.metrics import Metrics
from service.pipeline import Pipeline

pytestmark = pytest.mark.anyio

WISH = InferenceRequest(arrived_at=0.0, budget_gflops=None, subnetwork=None, top_k=2)


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
async def running(parts: Parts, profiles: ProfileTable, max_waiting: int = 8) -> AsyncIterator[Pipeline]:
    batcher = Batcher(parts.run, max_batch_size=4)
    pipeline = Pipeline(
        profiles=profiles,
        class_names=("a", "b", "c"),
        decode=parts.decode,
        decode_threads=ThreadPoolExecutor(1, "decode"),
        batcher=batcher,
        metrics=Metrics(CollectorRegistry()),
        max_waiting=max_waiting,
        clock=time.monotonic,
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(batcher.serve())
        await pipeline.warm_up(lambda: None)
        yield pipeline
        batcher.stop()


async def two_bytes() -> bytes:
    return b"xx"


async def test_the_event_loop_goes_on_while_images_are_decoded_and_models_run(profiles: ProfileTable) -> None:
    parts = Parts()
    async with running(parts, profiles) as pipeline:
        request = asyncio.create_task(pipeline.classify(two_bytes, WISH))
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

    async with running(parts, profiles, max_waiting=2) as pipeline:
        admitted = [asyncio.create_task(pipeline.classify(read, WISH)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="2 requests are waiting"):
            await pipeline.classify(read, WISH)
        assert reads == 2
        parts.decode_gate.set()
        parts.model_gate.set()
        assert len(await asyncio.gather(*admitted)) == 2
        assert await pipeline.classify(read, WISH)


async def test_waiting_for_a_decode_thread_is_time_in_the_queue(profiles: ProfileTable) -> None:
    parts = Parts()
    parts.model_gate.set()
    async with running(parts, profiles) as pipeline:
        requests = [asyncio.create_task(pipeline.classify(two_bytes, WISH)) for _ in range(2)]
        await asyncio.sleep(0.05)
        parts.decode_gate.set()
        first, second = [(await request).timing for request in requests]
    assert first.queue_s < first.decode_s
    assert second.decode_s < second.queue_s


async def test_a_cancelled_request_leaves_the_line_before_the_decoder(profiles: ProfileTable) -> None:
    parts = Parts()
    parts.model_gate.set()
    async with running(parts, profiles) as pipeline:
        staying, leaving = [asyncio.create_task(pipeline.classify(two_bytes, WISH)) for _ in range(2)]
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
            await pipeline.classify(read, InferenceRequest(0.0, 1e-12, None, 1))
