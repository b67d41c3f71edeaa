import json
from pathlib import Path

import pytest
from PIL import Image
from pydantic_settings import BaseSettings, CliSubCommand, SettingsConfigDict, get_subcommand

from models.latency import LatencyTable
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from service.errors import InvalidParameterError
from service.simulation.report import Simulate, simulate

CHEAP, BEST = SubNetwork(8, 0.5), SubNetwork(14, 1.0)
PROFILES = ProfileTable((SubNetworkProfile(CHEAP, 1_000_000_000, 0.7), SubNetworkProfile(BEST, 4_000_000_000, 0.8)))
LATENCIES = LatencyTable((1, 4), {CHEAP: (0.010, 0.025), BEST: (0.040, 0.085)})
UNMEASURED = ProfileTable(tuple(SubNetworkProfile(row.subnetwork, row.macs) for row in PROFILES.rows))


def test_a_sweep_prints_a_row_per_rate_and_policy_and_writes_json_and_a_plot(tmp_path: Path) -> None:
    command = Simulate(
        load=(0.5, 1),
        duration_s=10,
        compare=("slackfit", "level"),
        json_file=tmp_path / "out.json",
        plot_file=tmp_path / "out.png",
    )
    lines = simulate(command, PROFILES, LATENCIES).splitlines()
    assert lines[0] == (
        "1 machine sustains at most 47.06 requests/s at grid 14 at keep rate 1, 160 at grid 8 at keep rate 0.5"
    )
    assert [line.split()[:2] for line in lines[2:]] == [
        ["23.53", "level"],
        ["23.53", "slackfit"],
        ["47.06", "level"],
        ["47.06", "slackfit"],
    ]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["options"]["seed"] == 0
    assert [(run["policy"], round(run["rate"], 2)) for run in written["runs"]][1] == ("slackfit", 23.53)
    assert f"{written['runs'][0]['slo_attainment']:.2%}" in lines[2]
    assert 0.7 <= written["runs"][0]["effective_accuracy"] <= 0.8
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1_000_000) or ()) > 10


def test_a_profile_without_accuracy_can_be_simulated_and_plotted(tmp_path: Path) -> None:
    command = Simulate(rate=(5,), duration_s=2, plot_file=tmp_path / "out.png")
    assert "  -  " in simulate(command, UNMEASURED, LATENCIES)
    assert (tmp_path / "out.png").stat().st_size > 1000


@pytest.mark.parametrize(("machines", "attained"), [(1, (0.4, 0.75)), (2, (0.85, 1.0))])
def test_machines_share_the_requests(machines: int, attained: tuple[float, float], tmp_path: Path) -> None:
    """60 requests/s exceed what one machine sustains at its best level; 30/s for each of two machines do not."""
    path = tmp_path / "out.json"
    command = Simulate(rate=(60,), duration_s=20, machines=machines, policy="fixed-14-1", json_file=path)
    simulate(command, PROFILES, LATENCIES)
    run = json.loads(path.read_text())["runs"][0]
    assert sum(run["outcomes"].values()) == pytest.approx(1200, rel=0.1)
    assert attained[0] < run["slo_attainment"] <= attained[1]
    assert 0.5 < run["utilization"] <= 1


def test_an_unknown_policy_is_rejected_with_the_known_names() -> None:
    with pytest.raises(InvalidParameterError, match="unknown policy best-ever; choose from level"):
        simulate(Simulate(duration_s=1, rate=(10,), compare=("best-ever",)), PROFILES, LATENCIES)


def test_the_options_are_read_from_a_command_line() -> None:
    class Cli(BaseSettings):
        model_config = SettingsConfigDict(cli_kebab_case=True, cli_avoid_json=True, cli_implicit_flags=True)
        simulate: CliSubCommand[Simulate]

    line = "simulate --rate 50,100.5 --budget-ms 50,500 --slowdown 10:2,20:1 --compare slackfit,fixed-14-1 --machines 2"
    command = get_subcommand(Cli(_cli_parse_args=line.split()))
    assert command == Simulate(
        rate=(50, 100.5), budget_ms=(50, 500), slowdown="10:2,20:1", compare=("slackfit", "fixed-14-1"), machines=2
    )
