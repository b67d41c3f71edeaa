import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.files.checkpoint_errors import UnreadableCheckpointError
from models.header import Header
from models.latency import LatencyTable
from models.subnetwork import SubNetwork
from service.assembly import ProfileWithFile, ServedModel, assemble
from service.candidate import MEMORY_BYTES, MEMORY_OF_FILE, REHEARSED_S, BetweenBatches, CandidateMaker, OpenEngine
from service.domain import InferenceRequest
from service.engines.profile_store import begin_profile, extended_profile
from service.engines.torch_engine import TorchEngine
from service.errors import ModelChangeError, NotReadyError
from service.execution.engine_thread import EngineThread
from service.execution.results import Ranked
from service.machine.monitor import Monitor
from service.scheduling.key_ledger import KeyLedger
from service.settings import Settings
from service.telemetry.metrics import Metrics

pytestmark = pytest.mark.anyio

T = TypeVar("T")


class Noting(TorchEngine):
    """An engine that records what it ran."""

    def __init__(self, checkpoint: Checkpoint, described: str = "an engine") -> None:
        super().__init__(checkpoint.model, "cpu", threads=1)
        self.described, self.ran = described, list[tuple[SubNetwork, int]]()
        self.threads: list[str] = []
        self.bad: SubNetwork | None = None

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        self.ran.append((subnetwork, len(images)))
        self.threads.append(threading.current_thread().name)
        logits = super().run(images, subnetwork)
        return logits * float("nan") if subnetwork == self.bad else logits

    def describe(self) -> str:
        return self.described


class Stage:
    """A served model, and the maker of a candidate."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, free_bytes: int = 10**12) -> None:
        self.settings = Settings(checkpoint=str(folder), profile_folder=folder, max_batch_size=2)
        self.registry, self.thread = CollectorRegistry(), EngineThread()
        self.metrics = Metrics(self.registry)
        self.monitor = Monitor(nvml=None, memory_bytes=lambda: (2 * free_bytes, free_bytes))
        self.ledger, self.folder = KeyLedger(1.0), folder
        self.engine, self.new = Noting(checkpoint), Noting(checkpoint)
        self.checkpoint, self.begun, self.is_stopping = checkpoint, 0, False
        self.make(lambda checkpoint, *_: (self.new, checkpoint))

    def make(self, open_candidate: OpenEngine) -> None:
        self.maker = CandidateMaker(
            self.settings,
            self.thread,
            self.metrics,
            self.monitor,
            self.ledger,
            open_candidate=open_candidate,
            begin=self.begin,
            is_stopping=lambda: self.is_stopping,
        )

    def begin(self, checkpoint: Checkpoint, *others: object, **options: object) -> ProfileWithFile:
        self.begun += 1
        return begin_profile(checkpoint, *others, budget_s=0.0, **options)  # type: ignore[arg-type] # passed on as they are

    def served(self, known: ProfileWithFile | LatencyTable) -> ServedModel:
        return assemble(
            self.settings,
            self.checkpoint,
            self.engine,
            self.thread,
            metrics=self.metrics,
            monitor=self.monitor,
            threads=1,
            ledger=self.ledger,
            known=known,
        )

    @asynccontextmanager
    async def serving(self, known: ProfileWithFile | LatencyTable) -> AsyncIterator[ServedModel]:
        model = self.served(known)
        task = asyncio.create_task(model.serve())
        await asyncio.sleep(0)
        try:
            yield model
        finally:
            model.batcher.stop()
            await task
            self.thread.shutdown(wait=True)
            self.monitor.close()

    def measured(self) -> ProfileWithFile:
        return begin_profile(
            self.checkpoint, "an engine", self.engine.run, folder=self.folder, max_batch_size=2, budget_s=10.0
        )


@pytest.fixture
def path(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    path = tmp_path / "other.safetensors"
    header = Header("other", checkpoint.config, checkpoint.class_names, checkpoint.profile)
    save_checkpoint(path, checkpoint.model, header)
    return path


def test_a_checkpoint_is_loaded_only_if_the_free_memory_suffices(checkpoint: Checkpoint, path: Path) -> None:
    needed = MEMORY_OF_FILE * path.stat().st_size + MEMORY_BYTES
    assert Stage(checkpoint, path.parent, needed).maker.load(str(path)).name == "other"
    with pytest.raises(ModelChangeError, match="a second model of this size may take 500 MB; only 500 MB are free"):
        Stage(checkpoint, path.parent, needed - 1).maker.load(str(path))


def test_a_missing_checkpoint_file_is_unreadable(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UnreadableCheckpointError, match="no such file"):
        Stage(checkpoint, tmp_path).maker.load(str(tmp_path / "none.safetensors"))


async def test_a_model_of_the_same_architecture_inherits_the_latencies_without_measuring(
    checkpoint: Checkpoint, path: Path
) -> None:
    stage = Stage(checkpoint, path.parent)
    known = stage.measured()
    async with stage.serving(known) as old:
        new = await asyncio.to_thread(stage.maker.prepare, load_checkpoint(path), old)
    assert stage.begun == 0
    assert sorted(stage.new.ran) == [(subnetwork, 1) for subnetwork in checkpoint.config.subnetworks]
    figures, served = cast(ProfileWithFile, new.known)[0].figures, known[0].figures
    assert figures.seconds
    assert figures.seconds.items() <= served.seconds.items()  # the served model's grow on in idle moments
    assert figures.measured_at == served.measured_at
    new.close()


@pytest.mark.parametrize("is_on_gpu", [False, True])
async def test_a_candidate_is_run_on_the_thread_of_the_engine_and_freed_there_on_a_gpu(
    checkpoint: Checkpoint, path: Path, is_on_gpu: bool
) -> None:
    stage = Stage(checkpoint, path.parent)
    stage.new.is_on_gpu = is_on_gpu
    stage.new.warm_up = lambda: None  # type: ignore[method-assign] # of this engine only

    def on_thread() -> None:
        stage.new.threads.append(threading.current_thread().name)

    stage.new.close = on_thread  # type: ignore[method-assign] # of this engine only

    stage.make(lambda checkpoint, *_: (stage.new, checkpoint))
    async with stage.serving(stage.measured()) as old:
        new = await asyncio.to_thread(stage.maker.prepare, load_checkpoint(path), old)
        await asyncio.to_thread(stage.maker.release, new)
    assert len(stage.new.threads) == len(checkpoint.config.subnetworks) + 1
    *others, freed_on = (name.partition("_")[0] for name in stage.new.threads)
    assert set(others) == {"engine"}
    assert (freed_on == "engine") == is_on_gpu
    new.close()
    stage.is_stopping = True
    stage.maker.release(new)  # raises nothing


async def test_a_given_latency_table_is_used_for_the_new_model_as_well(checkpoint: Checkpoint, path: Path) -> None:
    table = LatencyTable((1, 2), dict.fromkeys(extended_profile(checkpoint).by_subnetwork, (0.1, 0.2)))
    stage = Stage(checkpoint, path.parent)
    async with stage.serving(table) as old:
        new = await asyncio.to_thread(stage.maker.prepare, load_checkpoint(path), old)
    assert new.known is table
    new.close()


@pytest.mark.parametrize("different", ["engine", "config"])
async def test_another_architecture_or_engine_is_measured(checkpoint: Checkpoint, path: Path, different: str) -> None:
    stage = Stage(checkpoint, path.parent)
    known, other = stage.measured(), load_checkpoint(path)
    if different == "engine":
        stage.new.described = "another"
    else:
        other = replace(other, config=replace(other.config, crop_fraction=0.5))
    async with stage.serving(known) as old:
        new = await asyncio.to_thread(stage.maker.prepare, other, old)
    assert stage.begun == 1
    assert len(stage.new.ran) > len(checkpoint.config.subnetworks)
    new.close()


async def test_a_model_with_logits_that_are_not_finite_is_not_served(checkpoint: Checkpoint, path: Path) -> None:
    stage = Stage(checkpoint, path.parent)
    stage.new.bad = checkpoint.config.subnetworks[-1]
    async with stage.serving(stage.measured()) as old:
        with pytest.raises(ModelChangeError, match="not finite"):
            await asyncio.to_thread(stage.maker.prepare, load_checkpoint(path), old)


async def test_recent_short_batches_are_rehearsed_unless_the_engine_pads_batches(
    checkpoint: Checkpoint, path: Path
) -> None:
    stage, (first, second, *_) = Stage(checkpoint, path.parent), checkpoint.config.subnetworks
    fast, slow = (REHEARSED_S / 2, REHEARSED_S), (REHEARSED_S, 2 * REHEARSED_S)
    seconds = dict.fromkeys(extended_profile(checkpoint).by_subnetwork, fast) | {second: slow}
    shapes = [(first, 2), (second, 2), (second, 1), (SubNetwork(99, 0.5), 1), (first, 3), (first, 2)]
    side, said = checkpoint.config.image_side, Ranked(np.zeros(2, np.float32), np.ones(2, np.float32), np.arange(2))
    async with stage.serving(LatencyTable((1, 2), seconds)) as old:
        new = await asyncio.to_thread(stage.maker.prepare, load_checkpoint(path), old)
        for subnetwork, size in shapes:
            old.sample.answered([torch.zeros(3, side, side, dtype=torch.uint8)] * size, subnetwork, [said] * size)
        stage.new.ran.clear()
        await asyncio.to_thread(stage.maker.rehearse, new, old)
        assert stage.new.ran == [(first, 2), (second, 1)]
        stage.new.pads_batches = True
        await asyncio.to_thread(stage.maker.rehearse, new, old)
        assert len(stage.new.ran) == 2
    new.close()


async def test_a_gpu_engine_warms_up_and_captures_the_same_graphs_as_at_a_start(
    checkpoint: Checkpoint, path: Path
) -> None:
    done: list[object] = []
    stage = Stage(checkpoint, path.parent)
    stage.new.is_on_gpu = True  # in fact there is no GPU
    stage.new.warm_up = lambda: done.append("warm")  # type: ignore[method-assign] # of this engine only
    stage.new.prepare = lambda *shape: done.append(shape)  # type: ignore[method-assign]
    async with stage.serving(stage.measured()) as old:
        new = await asyncio.to_thread(stage.maker.prepare, load_checkpoint(path), old)
    shapes = [(subnetwork, size) for size in (1, 2) for subnetwork in reversed(checkpoint.config.subnetworks)]
    assert done == ["warm", *shapes]
    new.close()


async def test_a_model_is_unused_once_it_has_answered_all_its_requests(
    checkpoint: Checkpoint, path: Path, photo: bytes
) -> None:
    stage = Stage(checkpoint, path.parent)
    async with stage.serving(stage.measured()) as model:
        assert model.is_unused
        with model.server.explainer.turn():
            assert not model.is_unused
        assert model.is_unused
        may_read = asyncio.Event()

        async def read(_: float) -> bytes:
            await may_read.wait()
            return photo

        asking = asyncio.create_task(model.server.pipeline.classify(read, InferenceRequest(time.monotonic())))
        await asyncio.sleep(0)
        assert not model.is_unused
        may_read.set()
        assert (await asking).predictions
        assert model.is_unused


async def test_a_prepared_model_affects_metrics_and_key_charges_only_once_it_is_announced(
    checkpoint: Checkpoint, path: Path
) -> None:
    stage = Stage(checkpoint, path.parent)

    def measured_at() -> float | None:
        return stage.registry.get_sample_value("supervit_profile_timestamp_seconds", {"model": "other"})

    async with stage.serving(stage.measured()) as old:
        new = await asyncio.to_thread(stage.maker.prepare, load_checkpoint(path), old)
        assert (measured_at(), stage.ledger.answer_gflops) == (None, 1.0)
        new.announce()
        cheapest = new.server.scheduler.catalog.lowest.gflops
        assert (measured_at() is None, stage.ledger.answer_gflops) == (False, cheapest)
        new.close()


class Busy(Stage):
    """A stage on which another process measures and does not end."""

    def begin(self, checkpoint: Checkpoint, *others: object, **options: object) -> ProfileWithFile:
        self.begun += 1
        is_stopping = cast(Callable[[], bool], options["is_stopping"])
        while not is_stopping():
            time.sleep(0.001)
        return super().begin(checkpoint, *others, **options)


async def test_a_stopping_server_does_not_wait_for_another_process_that_measures(
    checkpoint: Checkpoint, path: Path
) -> None:
    stage = Busy(checkpoint, path.parent)
    async with stage.serving(stage.measured()) as old:
        stage.new.described = "another engine"
        preparing = asyncio.create_task(asyncio.to_thread(stage.maker.prepare, load_checkpoint(path), old))
        while not stage.begun:  # noqa: ASYNC110 - another thread counts
            await asyncio.sleep(0.01)
        stage.is_stopping = True
        with pytest.raises(NotReadyError):
            await asyncio.wait_for(preparing, 10)


def test_the_wait_for_the_engine_is_no_part_of_a_candidates_latency(checkpoint: Checkpoint) -> None:
    now = 0.0

    class SlowEngine(Noting):
        def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
            nonlocal now
            now += 2.0
            return super().run(images, subnetwork)

    class BusyThread(EngineThread):
        def work(self, function: Callable[[], T]) -> "Future[T]":
            nonlocal now
            now += 18.0  # batches of requests come first
            done: Future[T] = Future()
            done.set_result(function())
            return done

    thread = BusyThread()
    between = BetweenBatches(SlowEngine(checkpoint), lambda step: thread.work(step).result(), lambda: now)
    for _ in range(3):
        between.run(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), checkpoint.config.largest)
    assert between.clock() == 6.0
