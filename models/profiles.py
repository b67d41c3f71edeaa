"""Table of the cost and the measured accuracy of each sub-network.

Runs without torch. A policy, not this table, decides which row to serve.
"""

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property

from models.flops import count_macs
from models.subnetwork import SubNetwork, SuperViTConfig

# Distance between the keep rates that can be added between the trained ones.
KEEP_RATE_STEP = 0.05
# Lower bound of an answer's normalised entropy: without it, the temperature of a certain answer would be 0.
LOWEST_ENTROPY = 1e-6


@dataclass(frozen=True, slots=True)
class SubNetworkProfile:
    """One row of a profile.

    Attributes:
        subnetwork: the sub-network that the row describes.
        macs: multiply-accumulates of one image, at least 1.
        top1, top5: measured accuracy, fractions 0..1; None where unmeasured.
        is_trained: whether the weights were trained at this keep rate.
        is_interpolated: whether the accuracy was interpolated between two measured ones.
        temperature, entropy_exponent: logits are divided by temperature * H ** entropy_exponent, which calibrates the
            probabilities; H is the entropy of the uncalibrated softmax divided by its maximum, log(classes), at least
            LOWEST_ENTROPY.
        calibration_error: expected calibration error on the measured images, 0..1; None where unmeasured.
        slowness: time per multiply-accumulate relative to the table's fastest rows, at least 1; more than 1 for a
            sub-network in floating point among others in 8 bits.

    Raises:
        ValueError: a value is outside its range.
    """

    subnetwork: SubNetwork
    macs: int
    top1: float | None = None
    top5: float | None = None
    is_trained: bool = True
    is_interpolated: bool = False
    temperature: float = 1.0
    entropy_exponent: float = 0.0
    calibration_error: float | None = None
    slowness: float = 1.0

    def __post_init__(self) -> None:
        if self.macs < 1:
            raise ValueError(f"MACs must be at least 1, not {self.macs}")
        if not 1 <= self.slowness < math.inf:
            raise ValueError(f"slowness must be finite and at least 1, not {self.slowness}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and above 0, not {self.temperature}")
        for name in ("top1", "top5", "entropy_exponent", "calibration_error"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in 0..1, not {value}")

    @property
    def gflops(self) -> float:
        """Cost in the literature's unit, 1e9 multiply-accumulates."""
        return self.macs / 1e9

    @property
    def work(self) -> float:
        """Multiply-accumulates weighted by `slowness`, with which latency grows."""
        return self.macs * self.slowness


@dataclass(frozen=True, slots=True)
class CascadeProfile:
    """A cascade: a second, larger sub-network looks at an image only where the first was unsure.

    Attributes:
        first, second: the sub-networks; each has a row in the table, and the second costs more.
        threshold: calibrated probability of the first answer, 0..1, below which the second sub-network runs as well.
        share: fraction of images on which the second sub-network ran, 0..1.
        top1: accuracy of the final answers, a fraction 0..1.

    Raises:
        ValueError: a value is outside its range.
    """

    first: SubNetwork
    second: SubNetwork
    threshold: float
    share: float
    top1: float

    def __post_init__(self) -> None:
        for name in ("threshold", "share", "top1"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} of a cascade must be in 0..1, not {getattr(self, name)}")


@dataclass(frozen=True)
class ProfileTable:
    """Profile of one checkpoint.

    Attributes:
        rows: one per sub-network, cheapest first.
        cascades: those worth running.

    Raises:
        ValueError: there are no rows, a sub-network has two, or a cascade does not lead from a row to one that costs
            more.
    """

    rows: tuple[SubNetworkProfile, ...]
    cascades: tuple[CascadeProfile, ...] = ()

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("a profile needs at least one row")
        object.__setattr__(self, "rows", tuple(sorted(self.rows, key=lambda row: (row.macs, row.subnetwork))))
        if len(self.by_subnetwork) != len(self.rows):
            raise ValueError("a profile has at most one row per sub-network")
        for cascade in self.cascades:
            first, second = (self.by_subnetwork.get(look) for look in (cascade.first, cascade.second))
            if first is None or second is None or first.macs >= second.macs:
                raise ValueError(f"a cascade must lead to a costlier row, not from {cascade.first} to {cascade.second}")

    @cached_property
    def by_subnetwork(self) -> dict[SubNetwork, SubNetworkProfile]:
        """The rows by sub-network."""
        return {row.subnetwork: row for row in self.rows}

    @cached_property
    def is_measured(self) -> bool:
        """Whether the accuracy of every row is known."""
        return all(row.top1 is not None for row in self.rows)

    @property
    def cheapest(self) -> SubNetworkProfile:
        """The row with the fewest multiply-accumulates."""
        return self.rows[0]

    @cached_property
    def frontier(self) -> tuple[SubNetworkProfile, ...]:
        """The rows whose accuracy no cheaper row reaches, cheapest first.

        Unless the accuracy of every row is known, each row counts as better than all that cost less.
        """
        if not self.is_measured:
            return self.rows
        best = -1.0
        frontier = []
        for row in self.rows:
            if row.top1 is not None and row.top1 > best:
                best = row.top1
                frontier.append(row)
        return tuple(frontier)

    def with_interpolated_rates(self, config: SuperViTConfig) -> "ProfileTable":
        """Add keep rates in steps between those of the table, so that some row comes close to almost any budget.

        They run on the same weights without training; their accuracy is interpolated linearly between their neighbours.
        A rate that keeps as many tokens as another is the same computation and is left out.
        """
        between: list[SubNetworkProfile] = []
        for grid in config.patch_grids:
            known = [row for row in self.rows if row.subnetwork.patch_grid == grid]
            known.sort(key=lambda row: row.subnetwork.keep_rate)
            for low, high in itertools.pairwise(known):
                gap = high.subnetwork.keep_rate - low.subnetwork.keep_rate
                steps = round(gap / KEEP_RATE_STEP)
                costs = {low.macs, high.macs}
                for row in (_interpolate(config, low, high, index / steps) for index in range(1, steps)):
                    if row.macs not in costs:
                        between.append(row)
                        costs.add(row.macs)
        return replace(self, rows=(*self.rows, *between))

    def expected_gflops(self, cascade: CascadeProfile) -> float:
        """Return the cost of a cascade in 1e9 multiply-accumulates, averaged over images."""
        return self.by_subnetwork[cascade.first].gflops + cascade.share * self.by_subnetwork[cascade.second].gflops

    @classmethod
    def unmeasured(cls, config: SuperViTConfig) -> "ProfileTable":
        """Build the table of the trained family of `config`: costs, but no accuracies."""
        return cls(tuple(SubNetworkProfile(sub, count_macs(config, sub)) for sub in config.subnetworks))


def _interpolate(
    config: SuperViTConfig, low: SubNetworkProfile, high: SubNetworkProfile, share: float
) -> SubNetworkProfile:
    """Return the row at `share` of the way from one keep rate to another of the same grid."""

    def between(first: float, second: float) -> float:
        return first + (second - first) * share

    def between_known(first: float | None, second: float | None) -> float | None:
        return None if first is None or second is None else between(first, second)

    rate = between(low.subnetwork.keep_rate, high.subnetwork.keep_rate)
    subnetwork = SubNetwork(low.subnetwork.patch_grid, round(rate, 6))
    return SubNetworkProfile(
        subnetwork,
        count_macs(config, subnetwork),
        between_known(low.top1, high.top1),
        between_known(low.top5, high.top5),
        is_trained=False,
        is_interpolated=True,
        temperature=between(low.temperature, high.temperature),
        entropy_exponent=between(low.entropy_exponent, high.entropy_exponent),
        slowness=max(low.slowness, high.slowness),
    )
