from dataclasses import replace

import pytest

from models.flops import count_macs
from models.latency import LatencyTable
from models.profiles import ProfileTable, SubNetworkProfile
from models.published import PUBLISHED
from models.subnetwork import SubNetwork
from service.errors import BudgetTooSmallError, InvalidParameterError
from service.menu import Menu

# grid, keep rate, MACs, top-1; (8, 1) is dominated and (10, 0.7) ties with the cheaper (10, 0.5).
ROWS = (
    (8, 0.5, 742_000_000, 0.70),
    (8, 1.0, 1_438_000_000, 0.72),
    (10, 0.5, 1_155_000_000, 0.73),
    (10, 0.7, 1_515_000_000, 0.73),
    (14, 0.5, 2_298_000_000, 0.80),
)
PROFILES = ProfileTable(tuple(SubNetworkProfile(SubNetwork(grid, rate), macs, top1) for grid, rate, macs, top1 in ROWS))


def menu_of(profiles: ProfileTable) -> Menu:
    return Menu.of(profiles, LatencyTable((1,), dict.fromkeys(profiles.by_subnetwork, (0.01,))))


def chosen(profiles: ProfileTable, budget_gflops: float | None) -> SubNetwork:
    menu = menu_of(profiles)
    return menu.options[menu.best_within(budget_gflops)[1]].row.subnetwork


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (None, (14, 0.5)),
        (1e9, (14, 0.5)),
        (2.298, (14, 0.5)),
        (2.297999, (10, 0.5)),
        (1.6, (10, 0.5)),
        (1.155, (10, 0.5)),
        (1.0, (8, 0.5)),
        (0.742, (8, 0.5)),
    ],
)
def test_a_budget_admits_the_most_accurate_that_fits_and_the_cheapest_on_a_tie(
    budget: float | None, expected: tuple[int, float]
) -> None:
    assert chosen(PROFILES, budget) == SubNetwork(*expected)


def test_a_budget_under_the_cheapest_is_refused_with_the_smallest_that_would_do() -> None:
    with pytest.raises(BudgetTooSmallError, match=r"0\.742") as caught:
        menu_of(PROFILES).best_within(0.7419)
    assert chosen(PROFILES, caught.value.details["smallest_budget_gflops"]) == SubNetwork(8, 0.5)


def test_a_dominated_sub_network_is_no_level_but_can_be_had_by_name() -> None:
    menu = menu_of(PROFILES)
    index = menu.index_of(SubNetwork(8, 1.0), None)
    assert menu.options[index].row.subnetwork == SubNetwork(8, 1.0)
    assert index >= menu.num_levels == 3


def test_a_named_sub_network_over_the_budget_is_refused_with_its_cost() -> None:
    with pytest.raises(BudgetTooSmallError) as caught:
        menu_of(PROFILES).index_of(SubNetwork(14, 0.5), 1.0)
    assert caught.value.details["smallest_budget_gflops"] == 2.298


def test_a_sub_network_outside_the_family_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match=r"grid 9 at keep rate 0\.5"):
        menu_of(PROFILES).index_of(SubNetwork(9, 0.5), None)


def test_without_measured_accuracy_the_largest_that_fits_is_the_best() -> None:
    unmeasured = ProfileTable(tuple(SubNetworkProfile(row.subnetwork, row.macs) for row in PROFILES.rows))
    assert chosen(unmeasured, 1.6) == SubNetwork(10, 0.7)
    assert menu_of(unmeasured).num_levels == 5


def test_keep_rates_between_use_a_budget_up_and_are_no_levels() -> None:
    _, config, top1 = PUBLISHED["deit"]
    rows = tuple(
        SubNetworkProfile(subnetwork, count_macs(config, subnetwork), percent / 100)
        for subnetwork, percent in zip(config.subnetworks, top1, strict=True)
    )
    profiles = ProfileTable(rows).with_rates_between(config, 0.05)
    menu = menu_of(profiles)
    level, beyond = menu.best_within(2.0)
    assert menu.options[level].row.subnetwork == SubNetwork(12, 0.5)
    assert menu.options[beyond].row.subnetwork == SubNetwork(12, 0.6)
    assert menu.options[beyond].row.gflops <= 2.0 < (menu.next_better(beyond) or rows[0]).gflops
    assert all(option.row.is_trained for option in menu.options[: menu.num_levels])
    as_measured = ProfileTable(tuple(replace(row, is_interpolated=False) for row in profiles.rows))
    assert menu_of(as_measured).num_levels == menu.num_levels
    assert menu.next_better(menu.num_levels - 1) is None


def test_a_rate_between_that_measured_better_than_a_dearer_level_displaces_nothing() -> None:
    cheap, dear = PROFILES.rows[0], PROFILES.rows[-1]
    lucky = SubNetworkProfile(SubNetwork(14, 0.45), dear.macs - 1, 0.81, is_trained=False)
    useful = SubNetworkProfile(SubNetwork(14, 0.4), dear.macs - 2, 0.79, is_trained=False)
    menu = menu_of(ProfileTable((cheap, useful, lucky, dear)))
    assert [menu.options[index].row for index in menu.frontier] == [cheap, useful, dear]
    assert menu.best.row == dear
    assert menu.options[menu.best_within(lucky.gflops)[1]].row == useful
    assert menu.index_of(lucky.subnetwork, None) >= menu.num_levels
    assert menu.next_better(menu.num_levels - 1) is None


def test_a_level_never_counts_as_faster_than_a_cheaper_one() -> None:
    rows = PROFILES.frontier
    figures = dict(zip((row.subnetwork for row in rows), ((0.03,), (0.02,), (0.05,)), strict=True))
    menu = Menu.of(ProfileTable(rows), LatencyTable((1,), figures))
    assert [option.seconds for option in menu.options] == [(0.03,), (0.03,), (0.05,)]
