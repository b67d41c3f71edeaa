from pathlib import Path

import pytest
import torch

from models.devices import autocast, has_bfloat16, native_dtype, resolve_device, training_dtype
from models.errors import DeviceError


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
def test_every_process_of_a_machine_uses_the_gpu_of_its_local_rank(name: str) -> None:
    assert resolve_device(name) == torch.device("cuda:0")
    assert resolve_device(name, local_rank=3) == torch.device("cuda:3")


@pytest.mark.usefixtures("gpus")
def test_a_gpu_given_by_its_index_is_used() -> None:
    assert resolve_device("cuda:1", local_rank=3) == torch.device("cuda:1")


@pytest.mark.parametrize("name", ["", "tpu9", "cuda:-1", "cuda:9999", "meta", "hpu"])
def test_an_unusable_device_is_refused_with_a_one_line_error(name: str) -> None:
    with pytest.raises(DeviceError) as caught:
        resolve_device(name)
    assert str(caught.value).startswith(f"device {name!r} cannot be used: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_named_precision_is_used_on_every_device(device: str) -> None:
    assert training_dtype(torch.device(device), "bfloat16") == torch.bfloat16
    assert training_dtype(torch.device(device), "float16") == torch.float16
    assert training_dtype(torch.device(device), "float32") == torch.float32


@pytest.mark.parametrize(
    ("cpuinfo", "dtype"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16", torch.bfloat16),
        ("flags\t\t: fpu amx_bf16", torch.bfloat16),
        ("Features\t: fp asimd bf16 i8mm", torch.bfloat16),
        ("flags\t\t: fpu avx512f avx512_vnni", torch.float32),
        (None, torch.float32),
    ],
)
def test_the_native_dtype_of_a_cpu_is_bfloat16_if_it_has_instructions_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # as from an older torch
    path = tmp_path / "cpuinfo"
    if cpuinfo:
        path.write_text(f"processor\t: 0\n{cpuinfo}\n")
    assert native_dtype(torch.device("cpu"), path) == dtype
    with autocast(torch.device("cpu"), dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ({"avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"neon": True, "bf16": False}, True),  # an Arm: the file decides
    ],
)
def test_what_torch_reports_of_an_x86_goes_before_the_file_of_linux(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reported: dict[str, bool], expected: bool
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("Features\t: fp asimd bf16\n")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: reported, raising=False)
    assert has_bfloat16(torch.device("cpu"), path) == expected


def test_a_gpu_of_rocm_has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert has_bfloat16(torch.device("cuda"))


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_the_native_dtype_of_a_gpu_is_bfloat16_from_ampere_on_and_float16_before(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert native_dtype(torch.device("cuda:1")) == dtype


def test_the_native_dtype_of_other_devices_is_float32() -> None:
    assert native_dtype(torch.device("meta")) == torch.float32


def test_precision_auto_trains_in_the_native_dtype_of_the_device() -> None:
    device = torch.device("cpu")
    assert training_dtype(device, "auto") == native_dtype(device)
