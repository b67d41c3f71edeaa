import math
from dataclasses import replace

import pytest

from models.flops import count_macs
from models.profiles import CascadeProfile, ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork, SuperViTConfig

CHEAP, FAIR, POOR, BEST = (SubNetwork(grid, rate) for grid, rate in ((8, 0.5), (8, 1.0), (10, 0.5), (14, 1.0)))


def measured() -> ProfileTable:
    return ProfileTable(
        (
            SubNetworkProfile(BEST, 4_599_000_000, 0.81, 0.95),
            SubNetworkProfile(POOR, 1_155_000_000, 0.74, 0.9),
            SubNetworkProfile(FAIR, 1_100_000_000, 0.74, 0.9),
            SubNetworkProfile(CHEAP, 742_000_000, 0.73, 0.9),
        )
    )


def test_rows_are_sorted_cheapest_first() -> None:
    table = measured()
    assert [row.subnetwork for row in table.rows] == [CHEAP, FAIR, POOR, BEST]
    assert table.cheapest.subnetwork == CHEAP
    assert table.by_subnetwork[BEST].gflops == pytest.approx(4.599)


def test_the_frontier_drops_rows_that_a_cheaper_one_equals_or_beats() -> None:
    assert [row.subnetwork for row in measured().frontier] == [CHEAP, FAIR, BEST]


def test_an_unmeasured_row_makes_every_row_part_of_the_frontier() -> None:
    rows = (*measured().rows, SubNetworkProfile(SubNetwork(12, 0.5), 2_000_000_000))
    table = ProfileTable(rows)
    assert not table.is_measured
    assert measured().is_measured
    assert table.frontier == table.rows


def test_rows_of_equal_cost_are_sorted_by_subnetwork() -> None:
    table = ProfileTable((SubNetworkProfile(FAIR, 5, 0.7), SubNetworkProfile(CHEAP, 5, 0.7)))
    assert [row.subnetwork for row in table.rows] == [CHEAP, FAIR]
    assert [row.subnetwork for row in table.frontier] == [CHEAP]


def test_an_empty_profile_and_a_duplicate_row_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        ProfileTable(())
    with pytest.raises(ValueError, match="at most one row"):
        ProfileTable((SubNetworkProfile(BEST, 1), SubNetworkProfile(BEST, 2)))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"macs": 0}, "MACs must be at least 1, not 0"),
        ({"macs": -5}, "MACs must be at least 1, not -5"),
        ({"top1": -0.1}, r"top1 must be in 0\.\.1, not -0\.1"),
        ({"top1": float("nan")}, r"top1 must be in 0\.\.1, not nan"),
        ({"top5": 7.0}, r"top5 must be in 0\.\.1, not 7\.0"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(SubNetworkProfile(BEST, 1, 0.0, 1.0), **values)  # type: ignore[arg-type] # MACs are integers here


def test_an_unmeasured_profile_lists_every_subnetwork_with_its_macs() -> None:
    config = SuperViTConfig()
    table = ProfileTable.unmeasured(config)
    assert table.by_subnetwork.keys() == set(config.subnetworks)
    assert all(row.macs == count_macs(config, row.subnetwork) for row in table.rows)
    assert all(row.top1 is None and row.top5 is None for row in table.rows)


# Three prune blocks on grids of 8 and 14: DeiT-S.
CONFIG = SuperViTConfig()
RATES = {
    SubNetwork(8, 0.5): (0.70, 0.90),
    SubNetwork(8, 0.7): (0.74, 0.92),
    SubNetwork(8, 1.0): (0.71, None),
    SubNetwork(14, 0.7): (0.80, 0.95),
    SubNetwork(14, 1.0): (0.86, 0.98),
}


def with_rates() -> ProfileTable:
    return ProfileTable(
        tuple(SubNetworkProfile(sub, count_macs(CONFIG, sub), top1, top5) for sub, (top1, top5) in RATES.items())
    )


def test_accuracy_between_two_keep_rates_of_a_grid_is_interpolated_linearly() -> None:
    rows = with_rates().with_interpolated_rates(CONFIG).by_subnetwork
    between = [SubNetwork(8, rate) for rate in (0.55, 0.6, 0.65)]
    assert [rows[sub].top1 for sub in between] == pytest.approx([0.71, 0.72, 0.73])
    assert [rows[sub].top5 for sub in between] == pytest.approx([0.905, 0.91, 0.915])
    assert [rows[sub].macs for sub in between] == [count_macs(CONFIG, sub) for sub in between]
    assert all(rows[sub].is_interpolated and not rows[sub].is_trained for sub in between)
    assert rows[SubNetwork(14, 0.85)].top1 == pytest.approx(0.83)
    falling = rows[SubNetwork(8, 0.85)]
    assert falling.top1 == pytest.approx(0.725)
    assert falling.top5 is None


def test_temperature_and_entropy_exponent_are_interpolated_between_keep_rates() -> None:
    low, high = (SubNetwork(8, rate) for rate in (0.5, 0.7))
    table = ProfileTable(
        (
            SubNetworkProfile(low, count_macs(CONFIG, low), temperature=1.0, entropy_exponent=0.1),
            SubNetworkProfile(high, count_macs(CONFIG, high), temperature=2.0, entropy_exponent=0.3),
        )
    )
    row = table.with_interpolated_rates(CONFIG).by_subnetwork[SubNetwork(8, 0.6)]
    assert (row.temperature, row.entropy_exponent) == pytest.approx((1.5, 0.2))


@pytest.mark.parametrize("exponent", [-0.1, 1.1, math.nan])
def test_an_entropy_exponent_that_is_not_a_fraction_is_refused(exponent: float) -> None:
    with pytest.raises(ValueError, match="entropy_exponent"):
        SubNetworkProfile(SubNetwork(8, 1.0), 1, entropy_exponent=exponent)


def test_interpolating_keep_rates_leaves_measured_rows_unchanged() -> None:
    table = with_rates()
    extended = table.with_interpolated_rates(CONFIG)
    assert [row for row in extended.rows if not row.is_interpolated] == list(table.rows)
    assert {sub.patch_grid for sub in extended.by_subnetwork} == {8, 14}
    assert extended.is_measured


def test_interpolating_in_steps_of_a_twentieth_gives_eleven_keep_rates_per_grid() -> None:
    extended = ProfileTable.unmeasured(CONFIG).with_interpolated_rates(CONFIG)
    rates = [sub.keep_rate for sub in extended.by_subnetwork if sub.patch_grid == 14]
    assert rates == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]
    assert not extended.is_measured
    assert all(row.top1 is None for row in extended.rows)


def test_interpolating_keep_rates_again_adds_nothing() -> None:
    extended = with_rates().with_interpolated_rates(CONFIG)
    assert extended.with_interpolated_rates(CONFIG) == extended


def test_a_keep_rate_that_keeps_as_many_tokens_as_another_is_left_out() -> None:
    config = SuperViTConfig(patch_grids=(2,), keep_rates=(0.5, 1.0))
    extended = ProfileTable.unmeasured(config).with_interpolated_rates(config)
    # Of five tokens, 0.5 and 0.6 keep three patches in the first prune block; all from 0.65 on keep four, like 1.
    costs = [row.macs for row in extended.rows]
    assert len(set(costs)) == len(costs)
    assert len(costs) < 5


CASCADE = CascadeProfile(CHEAP, BEST, threshold=0.85, share=0.25, top1=0.79)


def test_a_cascade_costs_its_first_subnetwork_and_its_share_of_the_second() -> None:
    table = replace(measured(), cascades=(CASCADE,))
    first, second = table.by_subnetwork[CHEAP].gflops, table.by_subnetwork[BEST].gflops
    assert table.expected_gflops(CASCADE) == pytest.approx(first + second / 4)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(CASCADE, first=BEST, second=CHEAP),
        replace(CASCADE, second=CHEAP),
        replace(CASCADE, first=SubNetwork(9, 0.5)),
    ],
)
def test_a_cascade_must_lead_from_a_row_to_a_costlier_row(wrong: CascadeProfile) -> None:
    with pytest.raises(ValueError, match="a cascade must lead to a costlier row, not from"):
        replace(measured(), cascades=(wrong,))


@pytest.mark.parametrize("name", ["threshold", "share", "top1"])
def test_threshold_share_and_top1_of_a_cascade_must_be_fractions(name: str) -> None:
    for value in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match=f"{name} of a cascade"):
            replace(CASCADE, **{name: value})  # type: ignore[arg-type] # the names are those of attributes


def test_interpolating_keep_rates_keeps_the_cascades() -> None:
    cascade = CascadeProfile(SubNetwork(8, 0.5), SubNetwork(14, 1.0), threshold=0.85, share=0.25, top1=0.79)
    assert replace(with_rates(), cascades=(cascade,)).with_interpolated_rates(CONFIG).cascades == (cascade,)


def test_slowness_multiplies_the_work_of_a_row_and_carries_over_to_interpolated_rows() -> None:
    config = SuperViTConfig()
    quick, slow = (replace(row, top1=0.5) for row in ProfileTable.unmeasured(config).rows[:2])
    assert (quick.work, replace(slow, slowness=1.5).work) == (quick.macs, 1.5 * slow.macs)
    table = ProfileTable((quick, replace(slow, slowness=1.5))).with_interpolated_rates(config)
    assert {row.slowness for row in table.rows if row.is_interpolated} == {1.5}


@pytest.mark.parametrize("slowness", [0.99, math.inf, math.nan])
def test_a_slowness_below_1_or_not_finite_is_refused(slowness: float) -> None:
    with pytest.raises(ValueError, match="slowness must be finite and at least 1"):
        SubNetworkProfile(CHEAP, 1, slowness=slowness)
