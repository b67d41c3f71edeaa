"""The catalog that a policy chooses from: variants with their accuracy, cost and latency by batch size here.

Runs without torch. Chooses nothing.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from itertools import accumulate, takewhile
from operator import attrgetter, itemgetter
from typing import TypeVar

from models.latency import LatencyTable
from models.profiles import CascadeProfile, ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from service.domain import SecondLook
from service.errors import BudgetTooSmallError, InvalidParameterError
from service.scheduling.variants import Grant, Variant, with_second_look

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Grants:
    """The grants of a catalog: by budget, from each cap on, ascending, and for each variant that is asked for alone."""

    by_cap: tuple[tuple[float, Grant], ...]
    alone: tuple[Grant, ...]


@dataclass(frozen=True, slots=True)
class VariantCatalog:
    """Every variant that can be served.

    Attributes:
        variants: first the levels: the accuracy frontier of the trained sub-networks and their cascades, fastest
            first, along which the policy moves. Then the variants between them, which serve to hit a budget closely,
            and those that a cheaper one equals, which can be had by name only. As levels, the former would divide the
            queue among more sub-networks, hence smaller batches, for next to no accuracy.
        num_levels: how many of the variants are levels.
        frontier: the variants that a budget chooses from: those that no variant of lower highest cost equals in
            accuracy, cheapest first.
        is_measured: whether the accuracies are known.
        best_single: the most accurate of the trained sub-networks, with one look.
        known_grants: grants of the same variants with another profile, for the constructor only; made by default.
    """

    variants: tuple[Variant, ...]
    num_levels: int
    frontier: tuple[Variant, ...]
    is_measured: bool
    best_single: Variant = field(init=False, repr=False, compare=False)
    _grants: "_Grants" = field(init=False, repr=False, compare=False)
    known_grants: InitVar["_Grants | None"] = None

    def __post_init__(self, known_grants: "_Grants | None") -> None:
        alone = (one for one in self.variants if one.second_look is None and one.profile.is_trained)
        object.__setattr__(self, "best_single", max(alone, key=lambda one: (one.worth, -one.profile.macs)))
        object.__setattr__(self, "_grants", known_grants or self._make_grants())

    @classmethod
    def of(cls, profiles: ProfileTable, latencies: LatencyTable, *, cascades: bool = True) -> "VariantCatalog":
        """Join accuracy and measured latency, in which no level counts as faster than a lower one: that would be noise.

        Args:
            profiles: the profiles of the checkpoint.
            latencies: the latencies of each of its sub-networks on this machine.
            cascades: whether to include the cascades of the checkpoint.

        Raises:
            KeyError: a sub-network of the profile has no latency.
        """
        levels = _levels(profiles, profiles.cascades if cascades else (), latencies)
        ordered = [*levels, *(profile for profile in profiles.rows if profile not in levels)]
        indices = {each.subnetwork: index for index, each in enumerate(ordered) if isinstance(each, SubNetworkProfile)}
        variants = [_variant(index, each, indices, profiles) for index, each in enumerate(ordered)]
        variants = _timed(variants, len(levels), latencies)
        frontier = _affordable(variants[: len(levels)], variants[len(levels) :])
        return cls(tuple(variants), len(levels), frontier, profiles.is_measured)

    def with_latencies(self, latencies: LatencyTable) -> "VariantCatalog":
        """Return the same variants with a better profile; levels stay levels, because requests were granted them."""
        variants = _timed(self.variants, self.num_levels, latencies)
        frontier = tuple(variants[variant.index] for variant in self.frontier)
        # A budget admits the same, whatever the latencies are.
        return replace(self, variants=tuple(variants), frontier=frontier, known_grants=self._grants)

    @property
    def levels(self) -> tuple[Variant, ...]:
        """The variants along which the policy moves, fastest first."""
        return self.variants[: self.num_levels]

    @property
    def max_batch_size(self) -> int:
        """The largest batch whose latency is known."""
        return len(self.variants[0].latency_by_batch_s)

    @property
    def lowest(self) -> Variant:
        """The lowest level, which is the fastest, but not always the cheapest variant: that is `frontier[0]`."""
        return self.variants[0]

    @property
    def least_gflops(self) -> float:
        """The smallest budget that admits a variant."""
        return self.frontier[0].gflops

    @property
    def best(self) -> Variant:
        """The most accurate level."""
        return self.variants[self.num_levels - 1]

    def grant_within(self, budget_gflops: float | None) -> Grant:
        """Return the grant of a budget, compared with costs as clients are shown them.

        Raises:
            BudgetTooSmallError: no variant fits; the error names the smallest budget that would do.
        """
        if budget_gflops is None:
            return self._grants.by_cap[-1][1]
        _require_budget(budget_gflops, self.frontier[0].profile, "the cheapest sub-network costs")
        by_cap = self._grants.by_cap
        return by_cap[bisect_right(by_cap, budget_gflops, key=itemgetter(0)) - 1][1]

    def grant_named(self, subnetwork: SubNetwork, budget_gflops: float | None = None) -> Grant:
        """Grant one sub-network, and one look.

        Raises:
            BudgetTooSmallError: the sub-network costs more than the budget.
            InvalidParameterError: there is no such variant.
        """
        for variant in self.variants:
            if variant.profile.subnetwork == subnetwork and variant.second_look is None:
                _require_budget(budget_gflops, variant.profile, f"{subnetwork} costs")
                return self.grant_single(variant)
        raise InvalidParameterError(
            f"{subnetwork} is not one of this model's sub-networks; GET /subnetworks lists them",
            parameter="patch_grid, keep_rate",
        )

    def grant_single(self, variant: Variant) -> Grant:
        """Grant one variant at every level."""
        return self._grants.alone[variant.index]

    def next_better(self, variant: Variant) -> Variant | None:
        """Return the next more accurate variant on the frontier; None for the best."""
        return next((one for one in self.frontier if one.worth > variant.worth), None)

    def _make_grants(self) -> "_Grants":
        caps = sorted({variant.most_gflops for variant in (*self.levels, *self.frontier)})
        alone = (Grant((each.index,) * self.num_levels, -1, each, is_pinned=True) for each in self.variants)
        return _Grants(tuple((cap, self._grant(cap)) for cap in caps), tuple(alone))

    def _grant(self, cap: float) -> Grant:
        """Find, for each level, the most accurate variant within the cap that is expected to be no more work.

        Where there is none, because cheap variants are slow, it is the one that is the least work. The highest level
        always gets the best variant within the cap.
        """
        affordable = [variant for variant in (*self.levels, *self.frontier) if variant.most_gflops <= cap]
        best = [variant for variant in self.frontier if variant.most_gflops <= cap][-1]
        if self.best.most_gflops <= cap and self.best.worth >= best.worth:
            best = self.best  # as accurate, but faster

        least = min(affordable, key=attrgetter("work"))
        limits = accumulate((level.work for level in self.levels), max)
        by_level = [
            max(
                (variant for variant in affordable if variant.work <= limit), key=attrgetter("worth"), default=least
            ).index
            for limit in limits
        ]
        by_level[-1] = best.index
        same = takewhile(lambda pair: pair[0] == pair[1], enumerate(by_level))
        return Grant(tuple(by_level), sum(1 for _ in same) - 1, best)


def _frontier(items: Iterable[T], cost: Callable[[T], float], worth: Callable[[T], float]) -> tuple[T, ...]:
    """Return the items that no item of lower cost equals in worth, cheapest first."""
    best, frontier = -1.0, []
    for item in sorted(items, key=cost):
        if worth(item) > best:
            best = worth(item)
            frontier.append(item)
    return tuple(frontier)


def _levels(
    profiles: ProfileTable, cascades: Iterable[CascadeProfile], latencies: LatencyTable
) -> tuple[SubNetworkProfile | CascadeProfile, ...]:
    """Return the accuracy frontier: trained sub-networks over their work, with the cascades that save time here.

    Two looks save less time than multiply-accumulates, because small batches take longer for each image.
    """
    alone = [profile for profile in profiles.rows if profile.is_trained]
    if not profiles.is_measured:
        return tuple(alone)
    trained = _frontier(alone, attrgetter("work"), lambda each: each.top1 or 0.0)
    usual = (latencies.max_batch_size - 1) // 2  # a usual batch size, half the largest, minus one
    slowest = accumulate((latencies.row(profile.subnetwork)[usual] for profile in trained), max)
    seconds: dict[SubNetworkProfile | CascadeProfile, float] = dict(zip(trained, slowest, strict=True))
    seconds |= {each: _expected_s(each, latencies)[usual] for each in cascades}
    return _frontier(seconds, seconds.__getitem__, lambda each: each.top1 or 0.0)


def _expected_s(cascade: CascadeProfile, latencies: LatencyTable) -> tuple[float, ...]:
    return with_second_look(latencies.row(cascade.first), latencies.row(cascade.second), cascade.share)


def _variant(
    index: int,
    each: SubNetworkProfile | CascadeProfile,
    indices: Mapping[SubNetwork, int],
    profiles: ProfileTable,
) -> Variant:
    """Make a variant that has no latencies yet."""
    if isinstance(each, SubNetworkProfile):
        return Variant(index, each, (), index)
    first, second = profiles.by_subnetwork[each.first], profiles.by_subnetwork[each.second]
    second_look = SecondLook(indices[each.second], second, each.threshold, each.share, each.top1)
    return Variant(index, first, (), indices[each.first], second_look)


def _timed(variants: Sequence[Variant], num_levels: int, latencies: LatencyTable) -> list[Variant]:
    timed: list[Variant] = []
    for variant in variants:
        seconds, second = latencies.row(variant.profile.subnetwork), variant.second_look
        if second is not None:
            seconds = with_second_look(seconds, latencies.row(second.profile.subnetwork), second.share)
        if 0 < variant.index < num_levels:
            seconds = tuple(map(max, seconds, timed[-1].latency_by_batch_s))
        timed.append(replace(variant, latency_by_batch_s=seconds))
    return timed


def _affordable(levels: Sequence[Variant], others: Sequence[Variant]) -> tuple[Variant, ...]:
    """Return the variants that a budget chooses from: the frontier over the highest cost, with untrained keep rates."""
    looks = [variant for variant in (*levels, *others) if variant.second_look is None]
    trained = _frontier(
        (one for one in looks if one.profile.is_trained), attrgetter("most_gflops"), attrgetter("worth")
    )
    between = [one for one in looks if not one.profile.is_trained and _is_below_dearer(one, trained)]
    return _frontier((*levels, *trained, *between), attrgetter("most_gflops"), attrgetter("worth"))


def _is_below_dearer(variant: Variant, trained: Sequence[Variant]) -> bool:
    """Return whether the next costlier trained one is better: an untrained keep rate that measures better is chance."""
    costlier = next((one for one in trained if one.profile.macs > variant.profile.macs), None)
    return costlier is not None and variant.worth < costlier.worth


def fits(profile: SubNetworkProfile, budget_gflops: float | None) -> bool:
    """Return whether a sub-network costs no more than the budget, compared with the cost as clients are shown it."""
    return budget_gflops is None or profile.gflops <= budget_gflops


def _require_budget(budget_gflops: float | None, profile: SubNetworkProfile, subject: str) -> None:
    if not fits(profile, budget_gflops):
        raise BudgetTooSmallError(
            f"a budget of {budget_gflops:.12g} GFLOPs is too small: {subject} {profile.gflops}",
            smallest_budget_gflops=profile.gflops,
        )
