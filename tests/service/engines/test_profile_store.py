"""The profile with which a server starts: stored figures, and a few measured cells. test_profiler has whole tables."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.latency_estimate import Cell
from models.subnetwork import SubNetwork
from service.engines.growing_profile import GrowingProfile, first_cells
from service.engines.profile_files import ProfileFile
from service.engines.profile_store import PROBES, begin_profile, extended_profile
from service.engines.profiler import cells_of
from service.errors import NotReadyError

SIZES = (1, 2, 4)


class Engine:
    """An engine that takes 2 ms per batch and 1 ms per image, times a factor, on its own clock."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self.checkpoint, self.folder = checkpoint, folder
        self.now, self.factor = 0.0, 1.0
        self.ran: list[Cell] = []

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        assert images.dtype == torch.uint8
        self.ran.append((subnetwork, len(images)))
        self.now += self.factor * (0.002 + 0.001 * len(images))
        return images[:, :, 0, 0].float()

    def begin(self, **options: Any) -> tuple[GrowingProfile, ProfileFile]:  # noqa: ANN401 - those of begin_profile
        self.ran.clear()
        given: dict[str, Any] = {"folder": self.folder, "max_batch_size": 4, "clock": lambda: self.now} | options
        return begin_profile(self.checkpoint, "fake", self.run, **given)


@pytest.fixture
def engine(checkpoint: Checkpoint, tmp_path: Path) -> Engine:
    return Engine(checkpoint, tmp_path)


def test_a_first_start_measures_few_cells_and_estimates_the_others(engine: Engine) -> None:
    profile, file = engine.begin()
    cells = first_cells(extended_profile(engine.checkpoint), SIZES)
    assert set(engine.ran) == set(profile.figures.seconds) == set(cells)
    latencies = profile.predict()
    for row in latencies.likely.seconds.values():
        assert row == pytest.approx((0.003, 0.004, 0.006), rel=1e-6)
    assert file.read() is not None
    assert profile.measured_share == len(cells) / len(cells_of(engine.checkpoint.config.subnetworks, SIZES))


def test_the_latencies_of_an_engine_that_pads_batches_are_marked_as_padded(engine: Engine) -> None:
    for is_padded in (True, False):
        latencies = engine.begin(is_padded=is_padded)[0].predict()
        assert latencies.likely.is_padded is is_padded
        assert latencies.cautious.is_padded is is_padded


def test_a_first_start_keeps_its_time_budget_but_measures_at_least_two_sub_networks(engine: Engine) -> None:
    profile, _ = engine.begin(budget_s=0.0)
    cheapest, most_expensive = first_cells(extended_profile(engine.checkpoint), SIZES)[:2]
    assert set(profile.figures.seconds) == {cheapest, most_expensive}
    engine.factor, engine.folder = 100.0, engine.folder / "another"
    began = engine.now
    profile, _ = engine.begin(budget_s=3.0)
    assert 2.0 < engine.now - began < 4.0


def test_a_later_start_continues_from_the_stored_figures(engine: Engine) -> None:
    first, _ = engine.begin()
    second, _ = engine.begin()
    most_expensive = max(first.figures.seconds, key=lambda cell: (cell[1] == 1, first.figures.seconds[cell]))
    assert engine.ran == [most_expensive] * PROBES
    assert second.figures.seconds == pytest.approx(dict(first.figures.seconds))
    assert second.began_at.replace(microsecond=0) == first.began_at.replace(microsecond=0)


def test_figures_that_the_machine_contradicts_are_measured_anew(engine: Engine) -> None:
    engine.begin()
    engine.factor = 20.0
    profile, _ = engine.begin()
    cell = first_cells(extended_profile(engine.checkpoint), SIZES)[0]
    assert profile.seconds(cell) == pytest.approx(20 * 0.003)


def test_a_server_that_stops_while_measuring_stores_no_figures(engine: Engine) -> None:
    def refuse(_images: Tensor, _subnetwork: SubNetwork) -> Tensor:
        raise NotReadyError("the server is stopping")

    with pytest.raises(NotReadyError):
        begin_profile(engine.checkpoint, "fake", refuse, folder=engine.folder, max_batch_size=4)
    assert not list(engine.folder.glob("*.json"))
