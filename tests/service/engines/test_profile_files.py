from datetime import UTC, datetime
from pathlib import Path

import pytest

from models.latency_estimate import Cell
from models.subnetwork import SubNetwork
from service.engines.profile_files import ProfileFile
from service.engines.profiler import Figures

CELLS: list[Cell] = [(SubNetwork(2, 0.5), 1), (SubNetwork(2, 0.5), 2), (SubNetwork(4, 1.0), 1)]
BEGAN_AT = datetime(2026, 1, 2, tzinfo=UTC)


def figures(*cells: Cell) -> Figures:
    return Figures(dict.fromkeys(cells, 0.01), dict.fromkeys(cells, 0.2), BEGAN_AT)


def in_another_process(folder: Path) -> ProfileFile:
    return ProfileFile(folder, "0123456789ab", "fake", CELLS)


@pytest.fixture
def file(tmp_path: Path) -> ProfileFile:
    return in_another_process(tmp_path)


def test_a_part_of_a_profile_is_stored_like_the_whole(file: ProfileFile) -> None:
    assert file.read() is None
    for count in (1, 3, 2):
        file.write(figures(*CELLS[:count]))
        assert file.read() == figures(*CELLS[:count])


def test_only_one_process_at_a_time_measures_in_idle_moments(file: ProfileFile, tmp_path: Path) -> None:
    other = in_another_process(tmp_path)
    assert file.claim()
    assert file.claim()
    assert not other.claim()
    with other.alone(lambda: True):  # a start does not wait for a process that measures when idle
        other.write(figures(*CELLS))
    file.release()
    file.release()
    assert other.claim()


def test_a_process_that_cannot_write_files_measures_for_itself(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = in_another_process(tmp_path / "file")
    assert file.claim()
    file.write(figures(*CELLS))
    assert file.read_if_changed() is None
    file.release()


def test_figures_of_another_process_are_read_once_and_own_figures_not_at_all(file: ProfileFile, tmp_path: Path) -> None:
    other = in_another_process(tmp_path)
    assert file.read_if_changed() is None
    file.write(figures(CELLS[0]))
    assert file.read_if_changed() is None
    assert other.read_if_changed() == figures(CELLS[0])
    assert other.read_if_changed() is None
    file.write(figures(*CELLS))
    assert other.read_if_changed() == figures(*CELLS)
