from dataclasses import replace

import pytest

from models.flops import count_macs
from models.profiles import ProfileTable, SubNetworkProfile
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


def test_rows_stand_cheapest_first() -> None:
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


def test_rows_of_equal_cost_stand_in_the_order_of_their_subnetworks() -> None:
    table = ProfileTable((SubNetworkProfile(FAIR, 5, 0.7), SubNetworkProfile(CHEAP, 5, 0.7)))
    assert [row.subnetwork for row in table.rows] == [CHEAP, FAIR]
    assert [row.subnetwork for row in table.frontier] == [CHEAP]


def test_an_empty_profile_and_a_doubled_row_are_refused() -> None:
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
        replace(SubNetworkProfile(BEST, 1, 0.0, 1.0), **values)  # type: ignore[arg-type] # MACs are whole here


def test_an_unmeasured_profile_lists_the_whole_family_with_its_costs() -> None:
    config = SuperViTConfig()
    table = ProfileTable.unmeasured(config)
    assert table.by_subnetwork.keys() == set(config.subnetworks)
    assert all(row.macs == count_macs(config, row.subnetwork) for row in table.rows)
    assert all(row.top1 is None and row.top5 is None for row in table.rows)
