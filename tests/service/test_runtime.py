"""A server whose engine captures CUDA graphs; the rest of its life is tested through its routes."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from models.subnetwork import SubNetwork
from service.assembly import ProfileWithFile
from service.domain import ServerState
from service.engines.growing_profile import GrowingProfile
from service.engines.profile_store import begin_profile, extended_profile
from service.engines.profiler import Figures, cells_of
from service.engines.torch_engine import TorchEngine
from service.machine.monitor import Monitor
from service.machine.snapshot import ResourceSnapshot
from service.runtime import ServerRuntime
from service.settings import Settings
from tests.service.engines.fake_graphs import FakeGraphDevice
from tests.service.http.scripted_server import ScriptedEngine, sample, serving

LIMIT_S = 20.0


class Capturing(TorchEngine):
    """An engine that records what it is asked to prepare."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.model, "cpu", 1, graph_device=FakeGraphDevice(total_bytes=100_000))
        self.prepared: list[tuple[SubNetwork, int]] = []

    def prepare(self, subnetwork: SubNetwork, batch_size: int) -> None:
        self.prepared.append((subnetwork, batch_size))
        super().prepare(subnetwork, batch_size)


class Quiet(Monitor):
    """A machine that nothing else uses, so that an idle engine may measure."""

    @property
    def latest(self) -> ResourceSnapshot:
        return ResourceSnapshot(taken_at=0.0, cores=4.0, cpus=4, others_cores=0.0)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(checkpoint=str(tmp_path), profile_folder=tmp_path, max_batch_size=6)


@pytest.fixture
def latencies(checkpoint: Checkpoint) -> LatencyTable:
    return LatencyTable((1, 6), dict.fromkeys(extended_profile(checkpoint).by_subnetwork, (1e-6, 2e-6)))


def test_the_trained_sub_networks_are_captured_before_the_first_request_small_batches_first(
    settings: Settings, checkpoint: Checkpoint
) -> None:
    engine, prepared = Capturing(checkpoint), []

    def begin(*arguments: Any, **options: Any) -> ProfileWithFile:  # noqa: ANN401 - passed on as they are
        prepared.extend(engine.prepared)
        return begin_profile(*arguments, **options)

    with serving(ServerRuntime(settings, checkpoint, engine, begin=begin)) as client:
        dear_first = tuple(reversed(checkpoint.config.subnetworks))
        assert prepared == [(subnetwork, size) for size in (1, 2, 4, 6) for subnetwork in dear_first]
        assert sample(client, "supervit_cuda_graphs ") >= 16
        assert sample(client, "supervit_cuda_graph_memory_bytes ") >= 160


def test_nothing_is_captured_if_the_latencies_are_given(
    settings: Settings, checkpoint: Checkpoint, latencies: LatencyTable
) -> None:
    engine = Capturing(checkpoint)
    with serving(ServerRuntime(settings, checkpoint, engine, latencies)) as client:
        assert sample(client, "supervit_cuda_graphs ") == 0
    assert engine.prepared == []


@pytest.mark.parametrize("is_measured", [False, True])
def test_other_sub_networks_are_captured_in_idle_moments_at_the_first_and_at_later_starts(
    settings: Settings, checkpoint: Checkpoint, is_measured: bool
) -> None:
    engine, profile = Capturing(checkpoint), extended_profile(checkpoint)
    cells = cells_of(list(profile.by_subnetwork), (1, 2, 4, 6))
    kept = Figures(dict.fromkeys(cells, 1e-3), dict.fromkeys(cells, 0.0), datetime.now(UTC)) if is_measured else None

    def begin(*arguments: Any, is_padded: bool, **options: Any) -> ProfileWithFile:  # noqa: ANN401 - passed on as they are
        assert is_padded
        _, file = begin_profile(*arguments, is_padded=is_padded, **options)
        return GrowingProfile(profile, (1, 2, 4, 6), kept or file.read(), is_padded=True), file

    with serving(ServerRuntime(settings, checkpoint, engine, begin=begin, monitor=Quiet())):
        deadline = time.monotonic() + LIMIT_S
        while set(engine.prepared) != set(cells) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert set(engine.prepared) == set(cells)


def test_a_stopping_server_captures_no_graphs(settings: Settings, checkpoint: Checkpoint) -> None:
    engine = Capturing(checkpoint)
    runtime = ServerRuntime(settings, checkpoint, engine)
    engine.warm_up = runtime.drain  # type: ignore[method-assign] # as a signal during the warm-up does
    with serving(runtime) as client:
        assert client.get("/health/ready").status_code == 503
    assert runtime.state is ServerState.DRAINING
    assert engine.prepared == []


def test_answers_of_a_gpu_are_explained_by_a_copy_of_the_weights_on_the_cpu(
    settings: Settings, checkpoint: Checkpoint, latencies: LatencyTable, photo: bytes
) -> None:
    engine = ScriptedEngine(checkpoint)
    engine.is_on_gpu, engine.logits = True, torch.zeros(1, 7)
    checkpoint.model.to(torch.bfloat16)  # as on most GPUs
    with serving(ServerRuntime(settings, checkpoint, engine, latencies)) as client:
        checkpoint.model.blocks = torch.nn.ModuleList()
        answer = client.post("/explain?patch_grid=4&keep_rate=0.5", content=photo)
    assert answer.status_code == 200
    (pruning,) = answer.json()["explanation"]["prunings"]
    assert len(pruning["kept"]) == 9  # ceil(0.5 * 17)
