from dataclasses import replace

import pytest

from models.flops import count_macs
from models.latency import LatencyTable
from models.profiles import ProfileTable, SubNetworkProfile
from models.published import PUBLISHED
from models.subnetwork import SubNetwork
from service.errors import BudgetTooSmallError, InvalidParameterError
from service.scheduling.catalog import VariantCatalog

# grid, keep rate, MACs, top-1; (8, 1) is dominated and (10, 0.7) ties with the cheaper (10, 0.5).
ROWS = (
    (8, 0.5, 742_000_000, 0.70),
    (8, 1.0, 1_438_000_000, 0.72),
    (10, 0.5, 1_155_000_000, 0.73),
    (10, 0.7, 1_515_000_000, 0.73),
    (14, 0.5, 2_298_000_000, 0.80),
)
PROFILES = ProfileTable(tuple(SubNetworkProfile(SubNetwork(grid, rate), macs, top1) for grid, rate, macs, top1 in ROWS))


def catalog_of(profiles: ProfileTable) -> VariantCatalog:
    return VariantCatalog.of(profiles, LatencyTable((1,), dict.fromkeys(profiles.by_subnetwork, (0.01,))))


def chosen(profiles: ProfileTable, budget_gflops: float | None) -> SubNetwork:
    catalog = catalog_of(profiles)
    return catalog.best_within(budget_gflops)[1].profile.subnetwork


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


def test_a_budget_under_the_cheapest_is_rejected_with_the_smallest_that_would_do() -> None:
    with pytest.raises(BudgetTooSmallError, match=r"0\.742") as caught:
        catalog_of(PROFILES).best_within(0.7419)
    assert chosen(PROFILES, caught.value.details["smallest_budget_gflops"]) == SubNetwork(8, 0.5)


def test_a_dominated_sub_network_is_no_level_but_can_be_had_by_name() -> None:
    catalog = catalog_of(PROFILES)
    variant = catalog.find(SubNetwork(8, 1.0))
    assert variant.profile.subnetwork == SubNetwork(8, 1.0)
    assert variant.index >= catalog.num_levels == 3
    assert catalog.variants[variant.index] is variant


def test_a_named_sub_network_over_the_budget_is_rejected_with_its_cost() -> None:
    with pytest.raises(BudgetTooSmallError) as caught:
        catalog_of(PROFILES).find(SubNetwork(14, 0.5), 1.0)
    assert caught.value.details["smallest_budget_gflops"] == 2.298


def test_a_sub_network_outside_the_family_is_rejected() -> None:
    with pytest.raises(InvalidParameterError, match=r"grid 9 at keep rate 0\.5"):
        catalog_of(PROFILES).find(SubNetwork(9, 0.5))


def test_without_measured_accuracy_the_largest_that_fits_is_the_best() -> None:
    unmeasured = ProfileTable(tuple(SubNetworkProfile(profile.subnetwork, profile.macs) for profile in PROFILES.rows))
    assert chosen(unmeasured, 1.6) == SubNetwork(10, 0.7)
    assert catalog_of(unmeasured).num_levels == 5


def test_keep_rates_between_use_a_budget_up_and_are_no_levels() -> None:
    _, config, top1 = PUBLISHED["deit"]
    rows = tuple(
        SubNetworkProfile(subnetwork, count_macs(config, subnetwork), percent / 100)
        for subnetwork, percent in zip(config.subnetworks, top1, strict=True)
    )
    profiles = ProfileTable(rows).with_rates_between(config, 0.05)
    catalog = catalog_of(profiles)
    level, over_limit = catalog.best_within(2.0)
    assert catalog.variants[level].profile.subnetwork == SubNetwork(12, 0.5)
    assert over_limit.profile.subnetwork == SubNetwork(12, 0.6)
    assert over_limit.profile.gflops <= 2.0 < (catalog.next_better(over_limit) or catalog.cheapest).profile.gflops
    assert all(variant.profile.is_trained for variant in catalog.variants[: catalog.num_levels])
    as_measured = ProfileTable(tuple(replace(profile, is_interpolated=False) for profile in profiles.rows))
    assert catalog_of(as_measured).num_levels == catalog.num_levels
    assert catalog.next_better(catalog.best) is None


def test_a_rate_between_that_measured_better_than_a_dearer_level_displaces_nothing() -> None:
    cheap, dear = PROFILES.rows[0], PROFILES.rows[-1]
    lucky = SubNetworkProfile(SubNetwork(14, 0.45), dear.macs - 1, 0.81, is_trained=False)
    useful = SubNetworkProfile(SubNetwork(14, 0.4), dear.macs - 2, 0.79, is_trained=False)
    catalog = catalog_of(ProfileTable((cheap, useful, lucky, dear)))
    assert [variant.profile for variant in catalog.frontier] == [cheap, useful, dear]
    assert catalog.best.profile == dear
    assert catalog.best_within(lucky.gflops)[1].profile == useful
    assert catalog.find(lucky.subnetwork).index >= catalog.num_levels
    assert catalog.next_better(catalog.best) is None


def test_a_level_never_counts_as_faster_than_a_cheaper_one() -> None:
    rows = PROFILES.frontier
    figures = dict(zip((profile.subnetwork for profile in rows), ((0.03,), (0.02,), (0.05,)), strict=True))
    catalog = VariantCatalog.of(ProfileTable(rows), LatencyTable((1,), figures))
    assert [variant.latency_by_batch_s for variant in catalog.variants] == [(0.03,), (0.03,), (0.05,)]


def test_a_variant_of_an_older_profile_is_still_found(catalog: VariantCatalog, fast_catalog: VariantCatalog) -> None:
    """A request may have been granted it before its latency was measured."""
    for older, newer in zip(catalog.variants, fast_catalog.variants, strict=True):
        assert older == newer
        assert older.latency_by_batch_s != newer.latency_by_batch_s
    assert fast_catalog.next_better(catalog.cheapest) == fast_catalog.variants[1]
