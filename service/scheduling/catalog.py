"""What a policy may choose from: variants with their accuracy, their cost and how long each batch takes here.

Runs without torch. Chooses nothing.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from models.latency import LatencyTable
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from service.errors import BudgetTooSmallError, InvalidParameterError

Latencies = Sequence[Sequence[float]]  # seconds by variant and then by batch size, less one


@dataclass(frozen=True, slots=True)
class Variant:
    """What a policy can choose: a sub-network with its accuracy, cost and latency here.

    Attributes:
        index: its place in the catalog.
        profile: its cost and accuracy.
        latency_by_batch_s: profiled latency of batches of 1, 2, 3, ..., never falling. A better profile makes no other
            variant.
    """

    index: int
    profile: SubNetworkProfile
    latency_by_batch_s: tuple[float, ...] = field(compare=False)


@dataclass(frozen=True, slots=True)
class VariantCatalog:
    """Every variant that can be had.

    Attributes:
        variants: first the levels: the accuracy frontier of the trained sub-networks, cheapest first, along which the
            policy moves. Then those between them, which serve to hit a budget closely, and those that a cheaper one
            equals, which can be had by name only. As levels, the former would divide the queue among more
            sub-networks, hence smaller batches, for next to no accuracy.
        num_levels: how many of the variants are levels.
        frontier: the variants that no cheaper one equals, cheapest first; every level is one of them.
        is_measured: whether the accuracies are known.
    """

    variants: tuple[Variant, ...]
    num_levels: int
    frontier: tuple[Variant, ...]
    is_measured: bool

    @classmethod
    def of(cls, profiles: ProfileTable, latencies: LatencyTable) -> "VariantCatalog":
        """Join accuracy and latency; a level never counts as faster than a lower one, because that would be noise.

        Raises:
            KeyError: a sub-network of the profile has no latency.
        """
        trained = ProfileTable(tuple(profile for profile in profiles.rows if profile.is_trained)).frontier
        levels: list[Variant] = []
        for profile in trained:
            latency_by_batch_s = latencies.row(profile.subnetwork)
            if levels:
                latency_by_batch_s = tuple(map(max, latency_by_batch_s, levels[-1].latency_by_batch_s))
            levels.append(Variant(len(levels), profile, latency_by_batch_s))
        others = [profile for profile in profiles.rows if profile not in trained]
        numbered = enumerate(others, start=len(levels))
        variants = (*levels, *(Variant(index, one, latencies.row(one.subnetwork)) for index, one in numbered))
        variant_of = {variant.profile: variant for variant in variants}
        eligible = [profile for profile in others if not profile.is_trained and _is_below_dearer(profile, trained)]
        frontier = ProfileTable((*trained, *eligible)).frontier
        return cls(variants, len(levels), tuple(variant_of[one] for one in frontier), profiles.is_measured)

    @property
    def max_batch_size(self) -> int:
        """The largest batch whose latency is known."""
        return len(self.variants[0].latency_by_batch_s)

    @property
    def cheapest(self) -> Variant:
        """The lowest level."""
        return self.variants[0]

    @property
    def best(self) -> Variant:
        """The most accurate level."""
        return self.variants[self.num_levels - 1]

    def best_within(self, budget_gflops: float | None) -> tuple[int, Variant]:
        """Find what a budget admits, compared in the number that clients are shown.

        Returns:
            The highest level whose cost is within the budget, and the most accurate variant that is.

        Raises:
            BudgetTooSmallError: nothing fits; names the smallest budget that would do.
        """
        if budget_gflops is None:
            return self.num_levels - 1, self.best
        _require_budget(budget_gflops, self.cheapest.profile, "the cheapest sub-network costs")
        levels = self.variants[: self.num_levels]  # costs ascend, as they do along the frontier
        level = bisect_right(levels, budget_gflops, key=lambda variant: variant.profile.gflops) - 1
        place = bisect_right(self.frontier, budget_gflops, key=lambda variant: variant.profile.gflops) - 1
        return level, self.frontier[place]

    def next_better(self, variant: Variant) -> Variant | None:
        """Return the next variant on the frontier, None behind the best."""
        place = self.frontier.index(variant) + 1
        return self.frontier[place] if place < len(self.frontier) else None

    def find(self, subnetwork: SubNetwork, budget_gflops: float | None = None) -> Variant:
        """Find the variant of a sub-network.

        Raises:
            BudgetTooSmallError: it costs more than the budget.
            InvalidParameterError: there is no such variant.
        """
        for variant in self.variants:
            if variant.profile.subnetwork == subnetwork:
                _require_budget(budget_gflops, variant.profile, f"{subnetwork} costs")
                return variant
        raise InvalidParameterError(
            f"{subnetwork} is not one of this model's sub-networks; GET /subnetworks lists them",
            parameter="patch_grid, keep_rate",
        )


def _is_below_dearer(profile: SubNetworkProfile, levels: Sequence[SubNetworkProfile]) -> bool:
    """Tell whether the next dearer level is more accurate: an untrained rate that measures better does so by chance."""
    dearer = next((level for level in levels if level.macs > profile.macs), None)
    return dearer is not None and (profile.top1 is None or dearer.top1 is None or profile.top1 < dearer.top1)


def fits(profile: SubNetworkProfile, budget_gflops: float | None) -> bool:
    """Tell whether a sub-network costs no more than the budget, compared in the number that clients are shown."""
    return budget_gflops is None or profile.gflops <= budget_gflops


def _require_budget(budget_gflops: float | None, profile: SubNetworkProfile, subject: str) -> None:
    if not fits(profile, budget_gflops):
        raise BudgetTooSmallError(
            f"a budget of {budget_gflops:.12g} GFLOPs is too small: {subject} {profile.gflops}",
            smallest_budget_gflops=profile.gflops,
        )
