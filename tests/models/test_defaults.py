import os

import pytest

from models.defaults import MAX_WORKERS, default_workers


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(1, 1, 1), (2, 1, 2), (16, 2, 8), (16, 3, 5), (4, 8, 1), (256, 2, MAX_WORKERS)]
)
def test_default_workers_divides_the_usable_cores_among_the_processes_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers() == workers
