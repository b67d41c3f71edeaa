import weakref
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.checkpoint import Checkpoint
from models.data.images import normalise
from models.errors import DeviceError
from models.subnetwork import Flavour, SubNetwork
from models.supervit import SuperViT
from service.engines.base import Captured
from service.engines.cuda_graphs import Graph
from service.engines.torch_engine import TorchEngine, growth_per_image, serving_dtype
from tests.service.engines.fake_graphs import FakeGraphDevice


@pytest.fixture
def capabilities(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What torch reports about the CPU, which has no bfloat16 unless a test sets it."""
    said: dict[str, object] = {"cpu_name": "Acme 3000", "avx512_f": True, "avx512_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(said), raising=False)
    return said


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("capabilities")
def test_the_engine_normalises_images_and_returns_the_logits_of_the_model(
    checkpoint: Checkpoint, images: Tensor
) -> None:
    engine = TorchEngine(checkpoint.model, "cpu", 1)
    for subnetwork in checkpoint.config.subnetworks:
        with torch.inference_mode():
            expected = checkpoint.model(normalise(images, checkpoint.config), subnetwork)
        assert torch.equal(engine.run(images, subnetwork), expected)


def test_an_untrained_patch_grid_is_rejected(checkpoint: Checkpoint, images: Tensor) -> None:
    with pytest.raises(ValueError, match="patch grid 3 was not trained"):
        TorchEngine(checkpoint.model, "cpu", 1).run(images, SubNetwork(3, 1.0))


def test_a_cpu_with_bfloat16_computes_in_bfloat16_and_returns_float32(
    checkpoint: Checkpoint, images: Tensor, capabilities: dict[str, object]
) -> None:
    largest = checkpoint.config.largest
    exact = TorchEngine(checkpoint.model, "cpu", 1).run(images, largest)
    capabilities["avx512_bf16"] = True
    engine = TorchEngine(checkpoint.model, "cpu", 1)
    rounded = engine.run(images, largest)
    assert "bfloat16" in engine.describe()
    assert {weight.dtype for weight in checkpoint.model.parameters()} == {torch.bfloat16}
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((9, 0), torch.bfloat16)])
def test_a_gpu_computes_in_bfloat16_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert serving_dtype(torch.device("cuda", 0)) == dtype


def test_warming_up_runs_every_trained_sub_network(checkpoint: Checkpoint) -> None:
    seen = []
    checkpoint.model.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    engine = TorchEngine(checkpoint.model, "cpu", 1)
    engine.warm_up()
    assert set(seen) == set(checkpoint.config.subnetworks)
    assert engine.fitting_images() is None
    assert not engine.is_on_gpu


def test_a_cpu_captures_nothing(checkpoint: Checkpoint) -> None:
    engine = TorchEngine(checkpoint.model, "cpu", 1)
    engine.prepare(checkpoint.config.largest, 2)
    assert engine.captured() is None
    assert not engine.pads_batches


@pytest.mark.usefixtures("capabilities")
def test_prepared_batches_run_as_graphs_and_others_eagerly_with_the_same_logits(
    checkpoint: Checkpoint, images: Tensor
) -> None:
    eager, device = TorchEngine(checkpoint.model, "cpu", 1), FakeGraphDevice()
    engine = TorchEngine(checkpoint.model, "cpu", 1, graph_device=device)
    assert engine.pads_batches
    largest, *others = sorted(checkpoint.config.subnetworks, reverse=True)
    engine.prepare(largest, 4)
    assert engine.captured() == Captured(1, device.held_bytes)
    torch.testing.assert_close(engine.run(images, largest), eager.run(images, largest))
    assert device.num_replays == 1
    for subnetwork in others:
        assert torch.equal(engine.run(images, subnetwork), eager.run(images, subnetwork))
    assert (device.num_captures, device.num_replays) == (1, 1)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """Records the names of the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - torch's
        self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


# A Python number turned into a tensor, a tensor turned into a Python number, a shape that depends on values.
NOT_CAPTURED = {"lift_fresh", "item", "_local_scalar_dense", "nonzero"}


class Noting(FakeGraphDevice):
    """A device that records the operations that each capture would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.captured: list[list[str]] = []

    def capture(self, forward: Callable[[], Tensor]) -> Graph:
        with Operations() as operations:
            forward()
        self.captured.append(operations.names)
        return super().capture(forward)


@pytest.mark.parametrize("fuse_pruned", [False, True])
@pytest.mark.parametrize("flavour", ["deit", "lvvit"])
def test_captured_operations_convert_no_python_numbers_and_are_the_same_for_any_batch_size(
    checkpoint: Checkpoint, images: Tensor, flavour: Flavour, fuse_pruned: bool
) -> None:
    config = replace(checkpoint.config, flavour=flavour, stem_width=4, fuse_pruned=fuse_pruned)
    device = Noting()
    engine = TorchEngine(SuperViT(config).eval(), "cpu", 1, graph_device=device)
    for subnetwork in config.subnetworks:
        for size in (1, 3):
            engine.prepare(subnetwork, size)
    assert len(device.captured) == 8
    assert all(NOT_CAPTURED.isdisjoint(names) for names in device.captured)
    assert all(device.captured[number] == device.captured[number + 1] for number in range(0, 8, 2))
    with torch.inference_mode(), Operations() as operations:
        normalise(images, config).sum().item()
    assert {"lift_fresh", "item"} <= set(operations.names)  # so the engine creates its constants only once


def test_the_description_tells_an_engine_with_cuda_graphs_from_one_without(checkpoint: Checkpoint) -> None:
    eager = TorchEngine(checkpoint.model, "cpu", 1).describe()
    engine = TorchEngine(checkpoint.model, "cpu", 1, graph_device=FakeGraphDevice())
    assert engine.describe() == f"{eager}, CUDA graphs"
    engine.prepare(checkpoint.config.largest, 1)
    assert engine.describe() == f"{eager}, CUDA graphs"


def test_a_gpu_bounds_batches_by_its_own_free_memory_at_the_largest_sub_network(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeGraphDevice()
    engine = TorchEngine(checkpoint.model, "cpu", 1, graph_device=device)
    peak = 0

    def reset(_: torch.device) -> None:
        nonlocal peak
        peak = 5000  # bytes of the weights

    def run(images: Tensor, subnetwork: SubNetwork) -> Tensor:
        nonlocal peak
        peak = max(peak, 5000 + len(images) * (300 if subnetwork == checkpoint.config.largest else 100))
        return images

    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(engine, "_device", gpu)
    monkeypatch.setattr(engine, "is_on_gpu", True)
    monkeypatch.setattr(engine, "run", run)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak)
    free_bytes = {gpu: 3000, torch.device("cuda", 0): 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes[device], 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 6500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 5000)
    engine.warm_up()
    assert engine.fitting_images() == 12  # four fifths of 4,500 bytes, at 300 bytes per image
    free_bytes[gpu] = 0
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5000)
    assert engine.fitting_images() == 1  # nothing is free: a batch of one may still fit, or fails alone
    engine.prepare(checkpoint.config.largest, 2)
    assert device.num_captures == 0  # a batch that does not fit is not captured
    free_bytes[gpu] = 750
    engine.prepare(checkpoint.config.largest, 2)
    assert device.num_captures == 1
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5010)
    assert engine.fitting_images() == 2  # of 750 bytes: the 10 that PyTorch keeps belong to the graph
    free_bytes[gpu] = 749
    assert engine.fitting_images() == 1


def test_memory_allocated_once_does_not_count_as_memory_per_image() -> None:
    assert growth_per_image(lambda count: 1_000_000 + 700 * count) == 700
    assert growth_per_image(lambda count: 1_000_000 - count) == 0


@pytest.mark.parametrize("device", ["bogus", "cuda:99"])
def test_a_device_that_does_not_exist_is_rejected_in_one_line(checkpoint: Checkpoint, device: str) -> None:
    with pytest.raises(DeviceError, match=f"device '{device}' cannot be used: [^\\n]+$"):
        TorchEngine(checkpoint.model, device, 1)


@pytest.mark.usefixtures("capabilities")
def test_the_engine_names_library_cpu_precision_and_threads(checkpoint: Checkpoint) -> None:
    engine = TorchEngine(checkpoint.model, "cpu", 1)
    assert engine.describe() == f"torch {torch.__version__} on Acme 3000, float32, 1 threads"


def test_a_closed_engine_holds_no_model(checkpoint: Checkpoint) -> None:
    model = SuperViT(checkpoint.config).eval()
    engine = TorchEngine(model, "cpu", 1)
    held = weakref.ref(model)
    del model
    assert held() is not None
    engine.close()
    assert held() is None


def test_the_engine_uses_the_given_number_of_threads(checkpoint: Checkpoint) -> None:
    try:
        engine = TorchEngine(checkpoint.model, "cpu", 2)
        assert torch.get_num_threads() == 2
        assert engine.describe().endswith(", 2 threads")
    finally:
        torch.set_num_threads(1)
