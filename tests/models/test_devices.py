import pytest
import torch

from models.devices import DeviceError, resolve_device


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
