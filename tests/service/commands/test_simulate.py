import json
from pathlib import Path

import pytest
from PIL import Image

from service.commands.simulate import simulate_machines
from service.errors import InvalidParameterError
from service.simulation.options import Simulate
from service.simulation.report import sweep
from tests.service.simulation.test_report import LATENCIES, PROFILES, UNMEASURED


def test_the_figures_are_written_as_json_and_as_a_plot(tmp_path: Path) -> None:
    written, plot = tmp_path / "out.json", tmp_path / "out.png"
    command = Simulate(load=(0.5, 1), duration_s=10, compare=("slackfit",), json_file=written, plot_file=plot)
    report = sweep(command, PROFILES, LATENCIES)
    assert simulate_machines(command, PROFILES, LATENCIES) == report.text
    content = json.loads(written.read_text())
    assert content["options"]["seed"] == 0
    assert content["runs"] == report.runs
    with Image.open(plot) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1_000_000) or ()) > 10


def test_a_profile_without_accuracy_can_be_plotted(tmp_path: Path) -> None:
    command = Simulate(rate=(5,), duration_s=2, plot_file=tmp_path / "out.png")
    simulate_machines(command, UNMEASURED, LATENCIES)
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_a_file_that_cannot_be_written_is_an_error_before_the_simulation(tmp_path: Path) -> None:
    unknown = Simulate(duration_s=1, rate=(10,), policy="best-ever", json_file=tmp_path / "none" / "out.json")
    with pytest.raises(FileNotFoundError):
        simulate_machines(unknown, PROFILES, LATENCIES)
    with pytest.raises(InvalidParameterError, match="unknown policy best-ever"):
        simulate_machines(unknown.model_copy(update={"json_file": None}), PROFILES, LATENCIES)
