import pytest
import torch

from models.devices import DeviceError, resolve_device, training_dtype


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there are GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))  # noqa: ARG005 - there is no such GPU


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto", local_rank=1) == resolve_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_every_process_of_a_machine_has_a_gpu_of_its_own(name: str) -> None:
    assert resolve_device(name) == torch.device("cuda:0")
    assert resolve_device(name, local_rank=3) == torch.device("cuda:3")


@pytest.mark.usefixtures("gpus")
def test_a_gpu_that_is_named_is_taken() -> None:
    assert resolve_device("cuda:1", local_rank=3) == torch.device("cuda:1")


@pytest.mark.parametrize("name", ["", "tpu9", "cuda:-1", "cuda:9999", "meta", "hpu"])
def test_a_device_that_holds_no_tensor_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(DeviceError) as caught:
        resolve_device(name)
    assert str(caught.value).startswith(f"device {name!r} cannot be used: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_precision_that_is_named_is_taken_everywhere(device: str) -> None:
    assert training_dtype(torch.device(device), "bfloat16") == torch.bfloat16
    assert training_dtype(torch.device(device), "float16") == torch.float16
    assert training_dtype(torch.device(device), "float32") == torch.float32


@pytest.mark.parametrize(("has_bfloat16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_takes_bfloat16_where_it_need_not_be_emulated(
    monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool, dtype: torch.dtype
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return has_bfloat16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert training_dtype(torch.device("cuda:1"), "auto") == dtype


@pytest.mark.parametrize(
    ("has_avx512", "has_amx", "dtype"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_a_cpu_takes_bfloat16_where_it_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, has_avx512: bool, has_amx: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert training_dtype(torch.device("cpu"), "auto") == dtype
    assert training_dtype(torch.device("meta"), "auto") == torch.float32  # what is neither has no say
