from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.data.images import normalise
from models.errors import DeviceError
from models.subnetwork import SubNetwork
from service.engines.torch_engine import TorchEngine, growth_per_image, serving_dtype


@pytest.fixture
def capabilities(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What torch says of the CPU; none of it has bfloat16 unless a test says so."""
    said: dict[str, object] = {"cpu_name": "Acme 3000", "avx512_f": True, "avx512_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(said), raising=False)
    return said


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("capabilities")
def test_the_engine_normalises_and_answers_what_the_model_answers(checkpoint: Checkpoint, images: Tensor) -> None:
    engine = TorchEngine(checkpoint.model, "cpu", 1)
    for subnetwork in checkpoint.config.subnetworks:
        with torch.inference_mode():
            expected = checkpoint.model(normalise(images, checkpoint.config), subnetwork)
        assert torch.equal(engine.run(images, subnetwork), expected)


def test_a_grid_that_was_not_trained_is_rejected(checkpoint: Checkpoint, images: Tensor) -> None:
    with pytest.raises(ValueError, match="patch grid 3 was not trained"):
        TorchEngine(checkpoint.model, "cpu", 1).run(images, SubNetwork(3, 1.0))


def test_a_cpu_with_bfloat16_computes_in_it_and_answers_in_float32(
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


def test_a_gpu_bounds_batches_by_its_own_free_memory_at_the_largest_sub_network(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TorchEngine(checkpoint.model, "cpu", 1)
    peak = 0

    def reset(_: torch.device) -> None:
        nonlocal peak
        peak = 5000  # the weights

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
    assert engine.fitting_images() == 12  # of 4,500 bytes four fifths, at 300 an image
    free_bytes[gpu] = 0
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5000)
    assert engine.fitting_images() == 1  # nothing is free: a batch of one may still find its place, or fails alone


def test_what_is_set_aside_once_does_not_count_as_memory_of_an_image() -> None:
    assert growth_per_image(lambda count: 1_000_000 + 700 * count) == 700
    assert growth_per_image(lambda count: 1_000_000 - count) == 0


@pytest.mark.parametrize("device", ["bogus", "cuda:99"])
def test_a_device_that_is_not_there_is_rejected_in_one_line(checkpoint: Checkpoint, device: str) -> None:
    with pytest.raises(DeviceError, match=f"device '{device}' cannot be used: [^\\n]+$"):
        TorchEngine(checkpoint.model, device, 1)


@pytest.mark.usefixtures("capabilities")
def test_the_engine_names_library_cpu_precision_and_threads(checkpoint: Checkpoint) -> None:
    engine = TorchEngine(checkpoint.model, "cpu", 1)
    assert engine.describe() == f"torch {torch.__version__} on Acme 3000, float32, 1 threads"


def test_the_engine_computes_on_as_many_threads_as_it_is_given(checkpoint: Checkpoint) -> None:
    try:
        engine = TorchEngine(checkpoint.model, "cpu", 2)
        assert torch.get_num_threads() == 2
        assert engine.describe().endswith(", 2 threads")
    finally:
        torch.set_num_threads(1)
