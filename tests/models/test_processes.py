import os

import pytest
import torch

from models.processes import MOST_WORKERS, Process, default_workers, gather, is_first, join_processes, joined_processes


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_every_process_takes_the_gpu_of_its_own_number(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    taken: list[torch.device] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))  # noqa: ARG005 - there is no such GPU
    assert join_processes(name) == Process(0, 1, torch.device("cuda:1"))
    assert taken == [torch.device("cuda:1")]


def test_a_process_alone_is_the_first_and_gathers_from_itself() -> None:
    with joined_processes("cpu") as process:
        assert process == Process(0, 1, torch.device("cpu"))
        assert process.is_first
        assert is_first()
        assert gather("its own") == ["its own"]


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(1, 1, 1), (2, 1, 2), (16, 2, 8), (16, 3, 5), (4, 8, 1), (256, 2, MOST_WORKERS)]
)
def test_the_cores_that_may_be_used_are_shared_among_the_processes_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers() == workers
