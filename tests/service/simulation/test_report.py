import pytest

from models.latency import LatencyTable
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from service.errors import InvalidParameterError
from service.simulation.options import Simulate
from service.simulation.report import sweep

CHEAP, BEST = SubNetwork(8, 0.5), SubNetwork(14, 1.0)
PROFILES = ProfileTable((SubNetworkProfile(CHEAP, 1_000_000_000, 0.7), SubNetworkProfile(BEST, 4_000_000_000, 0.8)))
LATENCIES = LatencyTable((1, 4), {CHEAP: (0.010, 0.025), BEST: (0.040, 0.085)})
UNMEASURED = ProfileTable(tuple(SubNetworkProfile(row.subnetwork, row.macs) for row in PROFILES.rows))


def test_a_sweep_has_a_row_per_rate_and_policy() -> None:
    report = sweep(Simulate(load=(0.5, 1), duration_s=10, compare=("slackfit", "level")), PROFILES, LATENCIES)
    lines = report.text.splitlines()
    assert lines[0] == (
        "1 machine sustains at most 47.06 requests/s at grid 14 at keep rate 1, 160 at grid 8 at keep rate 0.5"
    )
    assert [line.split()[:2] for line in lines[2:]] == [
        ["23.53", "level"],
        ["23.53", "slackfit"],
        ["47.06", "level"],
        ["47.06", "slackfit"],
    ]
    assert [(run["policy"], round(run["rate"], 2)) for run in report.runs][1] == ("slackfit", 23.53)
    assert f"{report.runs[0]['slo_attainment']:.2%}" in lines[2]
    assert 0.7 <= report.runs[0]["effective_accuracy"] <= 0.8


def test_a_sweep_has_the_course_of_the_policy_at_several_rates_or_of_all_policies_at_one() -> None:
    several = sweep(Simulate(load=(0.5, 1), duration_s=2, compare=("slackfit",)), PROFILES, LATENCIES)
    one = sweep(Simulate(rate=(20,), duration_s=2, compare=("slackfit",)), PROFILES, LATENCIES)
    assert list(several.courses) == ["level, 23.53/s", "level, 47.06/s"]
    assert list(one.courses) == ["level, 20/s", "slackfit, 20/s"]


def test_a_profile_without_accuracy_can_be_simulated() -> None:
    assert "  -  " in sweep(Simulate(rate=(5,), duration_s=2), UNMEASURED, LATENCIES).text


@pytest.mark.parametrize(("machines", "attained"), [(1, (0.4, 0.75)), (2, (0.85, 1.0))])
def test_machines_share_the_requests(machines: int, attained: tuple[float, float]) -> None:
    """60 requests/s exceed what one machine sustains at its best level; 30/s for each of two machines do not."""
    options = Simulate(rate=(60,), duration_s=20, machines=machines, policy="fixed-14-1")
    (run,) = sweep(options, PROFILES, LATENCIES).runs
    assert sum(run["outcomes"].values()) == pytest.approx(1200, rel=0.1)
    assert attained[0] < run["slo_attainment"] <= attained[1]
    assert 0.5 < run["utilization"] <= 1


def test_an_unknown_policy_is_rejected_with_the_known_names() -> None:
    with pytest.raises(InvalidParameterError, match="unknown policy best-ever; choose from level"):
        sweep(Simulate(duration_s=1, rate=(10,), compare=("best-ever",)), PROFILES, LATENCIES)
