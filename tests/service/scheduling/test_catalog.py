from dataclasses import replace

import pytest

from models.flops import count_macs
from models.latency import LatencyTable
from models.profiles import CascadeProfile, ProfileTable, SubNetworkProfile
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
    seconds = {profile.subnetwork: (profile.gflops / 100,) for profile in profiles.rows}
    return VariantCatalog.of(profiles, LatencyTable((1,), seconds))


def chosen(profiles: ProfileTable, budget_gflops: float | None) -> SubNetwork:
    catalog = catalog_of(profiles)
    return catalog.grant_within(budget_gflops).best.profile.subnetwork


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
def test_a_budget_admits_the_most_accurate_sub_network_that_fits_and_the_cheapest_on_a_tie(
    budget: float | None, expected: tuple[int, float]
) -> None:
    assert chosen(PROFILES, budget) == SubNetwork(*expected)


def test_a_budget_below_the_cheapest_is_rejected_with_the_smallest_sufficient_budget() -> None:
    with pytest.raises(BudgetTooSmallError, match=r"0\.742") as caught:
        catalog_of(PROFILES).grant_within(0.7419)
    assert chosen(PROFILES, caught.value.details["smallest_budget_gflops"]) == SubNetwork(8, 0.5)


def test_a_dominated_sub_network_is_no_level_but_is_available_by_name() -> None:
    catalog = catalog_of(PROFILES)
    variant = catalog.grant_named(SubNetwork(8, 1.0)).best
    assert variant.profile.subnetwork == SubNetwork(8, 1.0)
    assert variant.index >= catalog.num_levels == 3
    assert catalog.variants[variant.index] is variant


def test_a_sub_network_slower_than_a_better_one_is_no_level_but_is_granted_to_small_budgets() -> None:
    cheapest, *others = PROFILES.rows
    slow = ProfileTable((replace(cheapest, slowness=1.6), *others))
    catalog = catalog_of(slow)
    assert [level.profile.subnetwork for level in catalog.levels] == [SubNetwork(10, 0.5), SubNetwork(14, 0.5)]
    assert chosen(slow, 1.0) == cheapest.subnetwork
    assert set(catalog.grant_within(1.0).by_level) == {catalog.grant_named(cheapest.subnetwork).best.index}
    assert chosen(slow, 1.2) == SubNetwork(10, 0.5)
    with pytest.raises(BudgetTooSmallError, match=r"0\.742"):
        catalog.grant_within(0.7419)
    assert catalog_of(ProfileTable((replace(cheapest, slowness=1.5), *others))).num_levels == 3


def test_no_level_grants_a_variant_that_is_more_work_than_the_level() -> None:
    cheapest, second, *others = PROFILES.rows
    best_of_slow = replace(second, top1=0.79, slowness=1.5)  # between the third and the last in work
    catalog = catalog_of(ProfileTable((cheapest, best_of_slow, *others)))
    grant = catalog.grant_within(None)
    assert grant.by_level == tuple(range(catalog.num_levels))
    assert catalog.levels[-2].profile == best_of_slow


def test_a_named_sub_network_over_the_budget_is_rejected_with_its_cost() -> None:
    with pytest.raises(BudgetTooSmallError) as caught:
        catalog_of(PROFILES).grant_named(SubNetwork(14, 0.5), 1.0)
    assert caught.value.details["smallest_budget_gflops"] == 2.298


def test_a_sub_network_that_the_model_does_not_offer_is_rejected() -> None:
    with pytest.raises(InvalidParameterError, match=r"grid 9 at keep rate 0\.5"):
        catalog_of(PROFILES).grant_named(SubNetwork(9, 0.5))


def test_without_measured_accuracy_the_largest_sub_network_that_fits_is_the_best() -> None:
    unmeasured = ProfileTable(tuple(SubNetworkProfile(profile.subnetwork, profile.macs) for profile in PROFILES.rows))
    assert chosen(unmeasured, 1.6) == SubNetwork(10, 0.7)
    assert catalog_of(unmeasured).num_levels == 5


def test_interpolated_keep_rates_use_up_a_budget_but_are_no_levels() -> None:
    _, config, top1 = PUBLISHED["deit"]
    rows = tuple(
        SubNetworkProfile(subnetwork, count_macs(config, subnetwork), percent / 100)
        for subnetwork, percent in zip(config.subnetworks, top1, strict=True)
    )
    profiles = ProfileTable(rows).with_interpolated_rates(config)
    catalog = catalog_of(profiles)
    grant = catalog.grant_within(2.0)
    over_limit = grant.best
    assert catalog.variants[grant.highest_level].profile.subnetwork == SubNetwork(12, 0.5)
    assert [catalog.variants[index] for index in grant.by_level] == [
        *catalog.levels[: grant.highest_level + 1],
        *[over_limit] * (catalog.num_levels - grant.highest_level - 1),
    ]
    assert over_limit.profile.subnetwork == SubNetwork(12, 0.6)
    assert over_limit.profile.gflops <= 2.0 < (catalog.next_better(over_limit) or catalog.lowest).profile.gflops
    assert all(variant.profile.is_trained for variant in catalog.variants[: catalog.num_levels])
    as_measured = ProfileTable(tuple(replace(profile, is_interpolated=False) for profile in profiles.rows))
    assert catalog_of(as_measured).num_levels == catalog.num_levels
    assert catalog.next_better(catalog.best) is None


def test_an_untrained_keep_rate_that_measures_better_than_a_dearer_level_does_not_displace_it() -> None:
    cheap, expensive = PROFILES.rows[0], PROFILES.rows[-1]
    lucky = SubNetworkProfile(SubNetwork(14, 0.45), expensive.macs - 1, 0.81, is_trained=False)
    useful = SubNetworkProfile(SubNetwork(14, 0.4), expensive.macs - 2, 0.79, is_trained=False)
    catalog = catalog_of(ProfileTable((cheap, useful, lucky, expensive)))
    assert [variant.profile for variant in catalog.frontier] == [cheap, useful, expensive]
    assert catalog.best.profile == expensive
    assert catalog.grant_within(lucky.gflops).best.profile == useful
    assert catalog.grant_named(lucky.subnetwork).best.index >= catalog.num_levels
    assert catalog.next_better(catalog.best) is None


def test_a_level_never_counts_as_faster_than_a_cheaper_one() -> None:
    rows = PROFILES.frontier
    figures = dict(zip((profile.subnetwork for profile in rows), ((0.03,), (0.02,), (0.05,)), strict=True))
    catalog = VariantCatalog.of(ProfileTable(rows), LatencyTable((1,), figures))
    assert [variant.latency_by_batch_s for variant in catalog.variants] == [(0.03,), (0.03,), (0.05,)]


# Expected cost of the first: 0.742 + 0.5 * 1.155 = 1.3195 GFLOPs; of the second 0.742 + 0.4 * 2.298 = 1.6612.
TO_MIDDLE = CascadeProfile(SubNetwork(8, 0.5), SubNetwork(10, 0.5), threshold=0.7, share=0.5, top1=0.75)
TO_BEST = CascadeProfile(SubNetwork(8, 0.5), SubNetwork(14, 0.5), threshold=0.8, share=0.4, top1=0.79)
USELESS = CascadeProfile(SubNetwork(10, 0.5), SubNetwork(14, 0.5), threshold=0.4, share=0.9, top1=0.795)
CASCADING = replace(PROFILES, cascades=(TO_MIDDLE, TO_BEST, USELESS))


def test_cascades_on_the_accuracy_frontier_are_levels_between_the_sub_networks() -> None:
    catalog = catalog_of(CASCADING)
    assert [str(variant) for variant in catalog.levels] == [
        "grid 8 at keep rate 0.5",
        "grid 10 at keep rate 0.5",
        "grid 8 at keep rate 0.5, then grid 10 at keep rate 0.5 if less than 70% sure",
        "grid 8 at keep rate 0.5, then grid 14 at keep rate 0.5 if less than 80% sure",
        "grid 14 at keep rate 0.5",
    ]
    assert catalog_of(CASCADING).num_levels == 5
    assert [variant.gflops for variant in catalog.levels][2:4] == pytest.approx([1.3195, 1.6612])
    assert all(variant.index == index for index, variant in enumerate(catalog.variants))


def test_both_looks_of_a_cascade_refer_to_the_variants_of_their_sub_networks_alone() -> None:
    catalog = catalog_of(CASCADING)
    for variant in catalog.levels:
        first = catalog.variants[variant.first_index]
        assert (first.profile, first.second_look) == (variant.profile, None)
        if variant.second_look is not None:
            second = catalog.variants[variant.second_look.index]
            assert (second.profile, second.second_look) == (variant.second_look.profile, None)


@pytest.mark.parametrize(
    ("budget", "by_level", "best"),
    [
        (None, [0, 1, 2, 3, 4], 4),
        (3.04, [0, 1, 2, 3, 4], 4),  # 0.742 + 2.298
        (3.0399, [0, 1, 2, 2, 4], 4),  # the cascade to the best might cost more, the best alone does not
        (2.297, [0, 1, 2, 2, 2], 2),
        (1.897, [0, 1, 2, 2, 2], 2),  # 0.742 + 1.155
        (1.8969, [0, 1, 1, 1, 1], 1),
        (0.742, [0, 0, 0, 0, 0], 0),
    ],
)
def test_a_budget_is_compared_with_the_cost_of_both_looks(budget: float | None, by_level: list[int], best: int) -> None:
    catalog = catalog_of(CASCADING)
    grant = catalog.grant_within(budget)
    assert (list(grant.by_level), grant.best.index) == (by_level, best)
    assert grant.highest_level == next((level - 1 for level in range(5) if by_level[level] != level), 4)


def test_a_cascade_as_accurate_as_the_largest_sub_network_but_faster_is_granted() -> None:
    tied = catalog_of(replace(PROFILES, cascades=(replace(TO_BEST, top1=0.8),)))
    assert tied.best.second_look is not None
    grant = tied.grant_within(None)
    assert (grant.best, grant.by_level[-1]) == (tied.best, tied.best.index)
    assert tied.next_better(grant.best) is None
    assert tied.grant_within(2.5).best.profile.subnetwork == SubNetwork(14, 0.5)  # both looks might cost 3.04


def test_a_sub_network_by_name_looks_once() -> None:
    catalog = catalog_of(CASCADING)
    grant = catalog.grant_named(SubNetwork(8, 0.5))
    assert (grant.best, grant.is_pinned, set(grant.by_level)) == (catalog.lowest, True, {0})


def test_a_cascade_that_saves_compute_but_no_time_is_no_level() -> None:
    """Where every batch takes 10 ms, and one of second looks 10 ms more, no cascade is worth it."""
    seconds: dict[SubNetwork, tuple[float, ...]] = dict.fromkeys(PROFILES.by_subnetwork, (0.01,))
    assert VariantCatalog.of(CASCADING, LatencyTable((1,), seconds)).levels == catalog_like(seconds).levels
    to_best = {**seconds, SubNetwork(14, 0.5): (0.03,)}
    catalog = VariantCatalog.of(CASCADING, LatencyTable((1,), to_best))  # 10 + 0.5 * 10 ms, 10 + 0.4 * 30
    assert [variant.second_look is not None for variant in catalog.levels] == [False, False, True, True, False]


def catalog_like(seconds: dict[SubNetwork, tuple[float, ...]]) -> VariantCatalog:
    return VariantCatalog.of(PROFILES, LatencyTable((1,), seconds))


def test_cascades_are_left_out_where_disabled_or_where_accuracy_is_unmeasured() -> None:
    table = LatencyTable((1,), {profile.subnetwork: (profile.gflops / 100,) for profile in PROFILES.rows})
    assert VariantCatalog.of(CASCADING, table, cascades=False) == VariantCatalog.of(PROFILES, table)
    unmeasured = tuple(replace(profile, top1=None) for profile in PROFILES.rows)
    assert catalog_of(replace(CASCADING, rows=unmeasured)) == catalog_of(ProfileTable(unmeasured))


def test_the_expected_latency_of_a_cascade_includes_second_looks_for_its_share() -> None:
    seconds = {subnetwork: (0.01 * place, 0.02 * place) for place, subnetwork in enumerate(PROFILES.by_subnetwork, 1)}
    catalog = VariantCatalog.of(CASCADING, LatencyTable((1, 2), seconds))
    by_name = {str(variant): variant for variant in catalog.levels}
    to_best = by_name["grid 8 at keep rate 0.5, then grid 14 at keep rate 0.5 if less than 80% sure"]
    assert to_best.latency_by_batch_s == pytest.approx((0.01 + 0.4 * 0.05, 0.02 + 0.8 * 0.05))


def test_best_single_is_the_most_accurate_trained_sub_network_and_the_cheaper_on_a_tie() -> None:
    assert catalog_of(CASCADING).best_single.profile.subnetwork == SubNetwork(14, 0.5)
    assert catalog_of(ProfileTable(PROFILES.rows[:4])).best_single.profile.subnetwork == SubNetwork(10, 0.5)


def test_a_variant_of_an_older_profile_is_still_found(catalog: VariantCatalog, fast_catalog: VariantCatalog) -> None:
    """A request may have been granted the variant before its latency was measured."""
    for older, newer in zip(catalog.variants, fast_catalog.variants, strict=True):
        assert older == newer
        assert older.latency_by_batch_s != newer.latency_by_batch_s
    assert fast_catalog.next_better(catalog.lowest) == fast_catalog.variants[1]
