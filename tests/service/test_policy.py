import pytest

from models.flops import count_macs
from models.profiles import ProfileTable, SubNetworkProfile
from models.published import PUBLISHED
from models.subnetwork import SubNetwork
from service.domain import InferenceRequest
from service.errors import BudgetTooSmallError, InvalidParameterError
from service.policy import choose

# grid, keep rate, MACs, top-1; (8, 1) is dominated and (10, 0.7) ties with the cheaper (10, 0.5).
ROWS = (
    (8, 0.5, 742_000_000, 0.70),
    (8, 1.0, 1_438_000_000, 0.72),
    (10, 0.5, 1_155_000_000, 0.73),
    (10, 0.7, 1_515_000_000, 0.73),
    (14, 0.5, 2_298_000_000, 0.80),
)
PROFILES = ProfileTable(tuple(SubNetworkProfile(SubNetwork(grid, rate), macs, top1) for grid, rate, macs, top1 in ROWS))
UNMEASURED = ProfileTable(tuple(SubNetworkProfile(row.subnetwork, row.macs) for row in PROFILES.rows))


def wish(budget_gflops: float | None = None, subnetwork: SubNetwork | None = None) -> InferenceRequest:
    return InferenceRequest(arrived_at=0.0, budget_gflops=budget_gflops, subnetwork=subnetwork, top_k=1)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (None, (14, 0.5)),
        (1e9, (14, 0.5)),
        (2.3, (14, 0.5)),
        (2.298, (14, 0.5)),
        (2.297999, (10, 0.5)),
        (1.6, (10, 0.5)),
        (1.155, (10, 0.5)),
        (1.0, (8, 0.5)),
        (0.742, (8, 0.5)),
    ],
)
def test_the_most_accurate_that_fits_is_chosen_and_the_cheapest_on_a_tie(
    budget: float | None, expected: tuple[int, float]
) -> None:
    assert choose(wish(budget), PROFILES).profile.subnetwork == SubNetwork(*expected)


def test_every_sub_network_of_the_frontier_is_reached_by_its_own_cost_and_no_other_is_ever_chosen() -> None:
    chosen = {choose(wish(row.gflops), PROFILES).profile for row in PROFILES.rows}
    assert chosen == set(PROFILES.frontier)
    assert SubNetwork(8, 1.0) not in {row.subnetwork for row in chosen}


def test_a_budget_under_the_cheapest_is_refused_with_the_smallest_that_would_do() -> None:
    with pytest.raises(BudgetTooSmallError, match=r"0\.742") as caught:
        choose(wish(0.7419), PROFILES)
    smallest = caught.value.details["smallest_budget_gflops"]
    assert choose(wish(smallest), PROFILES).profile is PROFILES.cheapest


def test_a_dominated_sub_network_runs_when_asked_for_by_name() -> None:
    decision = choose(wish(subnetwork=SubNetwork(8, 1.0)), PROFILES)
    assert decision.profile.subnetwork == SubNetwork(8, 1.0)
    assert "by name" in decision.reason


def test_a_named_sub_network_over_the_budget_is_refused_with_its_cost() -> None:
    with pytest.raises(BudgetTooSmallError) as caught:
        choose(wish(1.0, SubNetwork(14, 0.5)), PROFILES)
    assert caught.value.details["smallest_budget_gflops"] == 2.298


def test_a_sub_network_outside_the_family_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match=r"grid 9 at keep rate 0\.5"):
        choose(wish(subnetwork=SubNetwork(9, 0.5)), PROFILES)


def test_without_measured_accuracy_the_largest_that_fits_is_chosen() -> None:
    assert choose(wish(1.6), UNMEASURED).profile.subnetwork == SubNetwork(10, 0.7)
    assert choose(wish(), UNMEASURED).profile.subnetwork == SubNetwork(14, 0.5)


def test_the_reason_names_the_budget_the_choice_and_what_the_next_better_one_would_cost() -> None:
    reason = choose(wish(2.0), PROFILES).reason
    assert "grid 10 at keep rate 0.5" in reason
    assert "2 GFLOPs" in reason
    assert "2.298" in reason
    assert "no budget" in choose(wish(), PROFILES).reason


def test_the_price_that_a_reason_names_buys_what_it_promises() -> None:
    rows = (
        SubNetworkProfile(SubNetwork(8, 1.0), 63_731_712, 0.7),
        SubNetworkProfile(SubNetwork(10, 1.0), 106_629_888, 0.8),
    )
    poor = choose(wish(0.07), ProfileTable(rows))
    price = float(poor.reason.rsplit(" ", 1)[1])
    assert choose(wish(price), ProfileTable(rows)).profile.subnetwork == SubNetwork(10, 1.0)


def test_the_published_deit_at_half_its_cost_runs_the_finest_grid_pruned_most() -> None:
    _, config, top1 = PUBLISHED["deit"]
    published = ProfileTable(
        tuple(
            SubNetworkProfile(subnetwork, count_macs(config, subnetwork), percent / 100)
            for subnetwork, percent in zip(config.subnetworks, top1, strict=True)
        )
    )
    assert choose(wish(2.3), published).profile.subnetwork == SubNetwork(14, 0.5)
    assert SubNetwork(8, 1.0) not in {row.subnetwork for row in published.frontier}
