import pytest
import torch

from models.processes import Process, gather, is_first, join_processes, joined_processes


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_process_uses_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    taken: list[torch.device] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))  # noqa: ARG005 - there is no such GPU
    assert join_processes(name) == Process(0, 1, torch.device("cuda:1"))
    assert taken == [torch.device("cuda:1")]


def test_a_single_process_is_the_first_and_gathers_only_its_own_value() -> None:
    with joined_processes("cpu") as process:
        assert process == Process(0, 1, torch.device("cpu"))
        assert process.is_first
        assert is_first()
        assert gather("its own") == ["its own"]
