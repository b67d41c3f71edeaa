import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.data.images import normalise
from models.subnetwork import SubNetwork, SuperViTConfig
from models.supervit import SuperViT
from service.engines.openvino_engine import OTHER_SHAPES_KEPT, SIZES_KEPT, OpenVINOEngine, has_bfloat16

# What converted ViTs have that the two published backbones do not.
CONVERTED: dict[str, dict[str, Any]] = {
    "registers": {"num_prefix_tokens": 4},
    "distilled": {"num_prefix_tokens": 2, "pooling": "distilled"},
    "clip": {"pre_norm": True, "activation": "quick_gelu", "norm_eps": 1e-5},
    "mean": {"pooling": "mean", "num_prefix_tokens": 3},
}


def config_of(kind: str) -> SuperViTConfig:
    """Three grids; two blocks prune, the last block among them; the numbers of classes, heads and sides all differ."""
    config = SuperViTConfig(
        flavour="lvvit" if kind == "lvvit" else "deit",
        width=24,
        depth=3,
        num_heads=2,
        patch_kernel=4,
        patch_grids=(2, 3, 5),
        prune_blocks=(1, 2),
        num_classes=7,
        stem_width=4,
        mean=(0.3, 0.4, 0.5),
        std=(0.1, 0.2, 0.3),
    )
    return replace(config, **CONVERTED.get(kind, {}))


@pytest.fixture(scope="module", params=["deit", "lvvit", *CONVERTED])
def model(request: pytest.FixtureRequest) -> SuperViT:
    """Weights so large that scores and logits have clear margins, and batch norm with its own statistics."""
    torch.manual_seed(11)
    model = SuperViT(config_of(request.param))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def engine(model: SuperViT) -> OpenVINOEngine:
    """An engine in float32 on any CPU: by default, one that has bfloat16 would compute in bfloat16."""
    return OpenVINOEngine(model, threads=1, precision="float32")


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def expected(model: SuperViT) -> Callable[[Tensor, SubNetwork], Tensor]:
    """A function that returns the logits of the torch model for uint8 images."""

    def expected(images: Tensor, subnetwork: SubNetwork) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(normalise(images, model.config), subnetwork)
            return logits

    return expected


def assert_same(logits: Tensor, expected: Tensor) -> None:
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_every_sub_network_matches_the_torch_model_at_any_batch_size(
    engine: OpenVINOEngine, expected: Callable[[Tensor, SubNetwork], Tensor], images: Tensor
) -> None:
    """They run in turn on the same graph: no run may leave anything behind for the next one."""
    for batch_size in (1, 3, 2):
        for subnetwork in config_of("deit").subnetworks:
            batch = images[:batch_size]
            assert_same(engine.run(batch, subnetwork), expected(batch, subnetwork))


@pytest.mark.parametrize("keep_rate", [0.01, 0.33, 0.85, 0.999])
def test_any_keep_rate_matches_the_torch_model(
    engine: OpenVINOEngine, expected: Callable[[Tensor, SubNetwork], Tensor], images: Tensor, keep_rate: float
) -> None:
    for grid in (3, 5):
        subnetwork = SubNetwork(grid, keep_rate)
        assert_same(engine.run(images, subnetwork), expected(images, subnetwork))


def test_logits_do_not_depend_on_the_other_images_of_the_batch(engine: OpenVINOEngine, images: Tensor) -> None:
    subnetwork = SubNetwork(5, 0.5)
    alone = torch.cat([engine.run(images[index : index + 1], subnetwork) for index in range(3)])
    torch.testing.assert_close(engine.run(images, subnetwork), alone, rtol=1e-5, atol=1e-5)


def test_logits_stay_unchanged_when_the_next_batch_runs(engine: OpenVINOEngine, images: Tensor) -> None:
    subnetwork = SubNetwork(5, 1.0)
    first = engine.run(images[:1], subnetwork)
    kept = first.clone()
    assert not torch.equal(engine.run(images[1:2], subnetwork), kept)
    assert torch.equal(first, kept)


def test_images_may_have_any_memory_layout(engine: OpenVINOEngine, images: Tensor) -> None:
    subnetwork = SubNetwork(3, 0.5)
    scattered = images.contiguous(memory_format=torch.channels_last)
    assert not scattered.is_contiguous()
    assert torch.equal(engine.run(scattered, subnetwork), engine.run(images, subnetwork))


def test_an_untrained_patch_grid_is_rejected_and_affects_no_later_batch(engine: OpenVINOEngine, images: Tensor) -> None:
    before = engine.run(images, SubNetwork(5, 0.7))
    with pytest.raises(ValueError, match=r"patch grid 4 was not trained; it must be one of \(2, 3, 5\)"):
        engine.run(images, SubNetwork(4, 0.7))
    assert torch.equal(engine.run(images, SubNetwork(5, 0.7)), before)


class Noting(OpenVINOEngine):
    """An engine that records what it is asked to run, and runs nothing."""

    def __init__(self, model: SuperViT) -> None:
        super().__init__(model, threads=1)
        self.seen: list[tuple[tuple[int, ...], SubNetwork]] = []

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        self.seen.append((tuple(images.shape), subnetwork))
        return images


def test_warming_up_runs_every_trained_sub_network(model: SuperViT) -> None:
    engine = Noting(model)
    engine.warm_up()
    assert engine.seen == [((1, 3, 20, 20), subnetwork) for subnetwork in config_of("deit").subnetworks]


def test_an_engine_of_exported_graphs_gives_the_same_logits(
    model: SuperViT, engine: OpenVINOEngine, images: Tensor
) -> None:
    other = OpenVINOEngine(model, threads=1, precision="float32", compiled=lambda read: map(read, engine.export()))
    assert other.describe() == engine.describe()
    for subnetwork in model.config.subnetworks:
        assert torch.equal(other.run(images, subnetwork), engine.run(images, subnetwork))


def test_a_closed_engine_holds_no_graph(model: SuperViT, engine: OpenVINOEngine) -> None:
    graphs: list[weakref.ref[object]] = []

    def compiled(read: Callable[[bytes], object]) -> Iterator[object]:
        for exported in engine.export():
            graph = read(exported)
            graphs.append(weakref.ref(graph))
            yield graph

    other = OpenVINOEngine(model, threads=1, precision="float32", compiled=compiled)
    assert [graph() is None for graph in graphs] == [False]
    other.close()
    assert [graph() is None for graph in graphs] == [True]


def test_the_engine_names_library_cpu_precision_and_threads(engine: OpenVINOEngine) -> None:
    assert re.fullmatch(r"openvino 20[\d.]+ on \S.*\S, float32, 1 threads", engine.describe())
    assert engine.fitting_images() is None


def test_the_fastest_precision_of_this_cpu_is_the_default(model: SuperViT, images: Tensor) -> None:
    engine = OpenVINOEngine(model, threads=1)
    fastest = "bfloat16" if has_bfloat16() else "float32|float16"  # float16 on ARM
    assert re.search(f", ({fastest}), ", engine.describe())
    assert engine.run(images, model.config.largest).dtype == torch.float32


def test_torch_is_limited_to_one_thread_beside_openvino(model: SuperViT) -> None:
    torch.set_num_threads(2)
    OpenVINOEngine(model, threads=1)
    assert torch.get_num_threads() == 1


def test_openvino_loads_no_telemetry_and_writes_nothing_to_the_home_folder(tmp_path: Path) -> None:
    script = "import service.engines.openvino_engine, sys; print(sys.modules['openvino_telemetry'])"
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
    assert not list(tmp_path.iterdir())


def test_signals_are_handled_after_engines_are_destroyed() -> None:
    """This runs in a separate process, because a wrong signal stack would end it."""
    script = f"""
import gc, signal
from models.subnetwork import SuperViTConfig
from models.supervit import SuperViT
from service.engines.openvino_engine import OTHER_SHAPES_KEPT, SIZES_KEPT, OpenVINOEngine
model = SuperViT({config_of("deit")!r}).eval()
engines = [OpenVINOEngine(model, 1) for _ in range(2)]
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
while engines:
    del engines[0]
    gc.collect()
signal.raise_signal(signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "handled\n"


class NotingEngine(OpenVINOEngine):
    """An engine that records what it runs."""

    def __init__(self, model: SuperViT) -> None:
        super().__init__(model, 1)
        self.ran: list[tuple[SubNetwork, int]] = []

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        self.ran.append((subnetwork, len(images)))
        return super().run(images, subnetwork)


def test_prepare_runs_a_shape_again_only_if_its_kernels_may_have_been_evicted(model: SuperViT) -> None:
    engine, subnetwork, side = NotingEngine(model), model.config.largest, model.config.image_side
    kept = SIZES_KEPT * len(model.config.subnetworks) + OTHER_SHAPES_KEPT
    for size in range(1, kept + 2):
        engine.prepare(subnetwork, size)
        engine.run(torch.zeros(size, 3, side, side, dtype=torch.uint8), subnetwork)
    assert len(engine.ran) == kept + 1  # a new shape gets its kernels in its first run
    engine.prepare(subnetwork, 2)
    assert len(engine.ran) == kept + 1  # its kernels are still kept
    engine.prepare(subnetwork, 1)
    assert engine.ran[kept + 1 :] == [(subnetwork, 1)]
    engine.prepare(subnetwork, 1)
    assert len(engine.ran) == kept + 2
