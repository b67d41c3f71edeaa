"""What a model needs to run its products in 8 bits, and its accuracy then. Values only; runs without torch."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, get_args

from models.profiles import ProfileTable
from models.subnetwork import SubNetwork, SuperViTConfig

Layer = Literal["qkv", "proj", "fc1", "fc2"]
LAYERS: tuple[Layer, ...] = get_args(Layer)
SMOOTHING_STEPS = 4  # per factor of 2 in a channel's smoothing
SMOOTHING_BOUND = 20 * SMOOTHING_STEPS
MIN_RANGE_WIDTH, MAX_RANGE_END = 1e-7, 1e9
QUANTIZATION_STEPS = 255  # from the least to the greatest of 256 values
TOLERATED_LOSS = 0.003  # of top-1 as a fraction, of each sub-network, against floating point
# Time in floating point over time in 8 bits: 1.53 to 1.63 with VNNI and bfloat16, 1.43 to 1.63 with AVX2 and float32,
# both at DeiT-S's size and batches of 8.
SLOWNESS = 1.5
ACCURACY_TOLERANCE = 1e-9  # tolerance for rounding in a difference of accuracies


@dataclass(frozen=True, slots=True, order=True)
class ProductInput:
    """The input of one matrix product: `layer` of a block, whose index is 0-based."""

    block: int
    layer: Layer


@dataclass(frozen=True, slots=True)
class Range:
    """The range of activations that 256 values represent; activations beyond it are clamped to its ends.

    Attributes:
        low, high: the ends, of smoothed activations.
        smoothing: for each channel the integer n of its factor 2 ** (n / SMOOTHING_STEPS), by which the channel is
            divided before quantisation and its weights are multiplied (Xiao et al., "SmoothQuant", ICML 2023); empty
            for no smoothing.

    Raises:
        ValueError: 0 is not in the range, its ends are not finite, too close or too large, or a channel's n is beyond
            SMOOTHING_BOUND.
    """

    low: float
    high: float
    smoothing: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not -math.inf < self.low <= 0 < self.high < math.inf:
            raise ValueError(f"a range must be finite with low <= 0 < high, not {self.low}..{self.high}")
        if self.high - self.low < MIN_RANGE_WIDTH or max(-self.low, self.high) > MAX_RANGE_END:
            raise ValueError(f"a range must be representable in float32, not {self.low}..{self.high}")
        if any(abs(step) > SMOOTHING_BOUND for step in self.smoothing):
            raise ValueError(f"a channel's smoothing must be from -{SMOOTHING_BOUND} to {SMOOTHING_BOUND}")

    @classmethod
    def of(cls, low: float, high: float, smoothing: tuple[int, ...] = ()) -> "Range":
        """Make a range with about these ends in which 0 is one of the 256 values.

        Integers need a whole number as zero point. A zero point that is not whole is rounded at serving: an error of up
        to half of a step times the sum of each output's weights, which doubled the error of logits.
        """
        low = min(low, 0.0)
        step = max(high - low, 1e-6) / QUANTIZATION_STEPS
        below = min(round(-low / step), QUANTIZATION_STEPS - 1)
        return cls(-below * step, (QUANTIZATION_STEPS - below) * step, smoothing)


@dataclass(frozen=True, slots=True)
class BlockRanges:
    """The ranges of the inputs of one block's products."""

    qkv: Range
    proj: Range
    fc1: Range
    fc2: Range


@dataclass(frozen=True, slots=True)
class Quantization:
    """What it takes to run a checkpoint in 8 bits.

    Attributes:
        ranges: activation ranges, one per block; those of weights follow from the weights.
        profile: cost and accuracy of each sub-network in 8 bits, with scalings of its own.
    """

    ranges: tuple[BlockRanges, ...]
    profile: ProfileTable

    def losses(self, profile: ProfileTable) -> dict[SubNetwork, float]:
        """Return how much top-1 each sub-network loses against `profile`, where both accuracies are known."""
        before = {row.subnetwork: row.top1 for row in profile.rows}
        return {
            row.subnetwork: known - row.top1
            for row in self.profile.rows
            if row.top1 is not None and (known := before.get(row.subnetwork)) is not None
        }

    def too_lossy(self, profile: ProfileTable) -> list[SubNetwork]:
        """Return the trained sub-networks that lose over TOLERATED_LOSS, or an unknown amount, against `profile`."""
        losses = self.losses(profile)
        trained = (row.subnetwork for row in self.profile.rows if row.is_trained)
        return [each for each in trained if not losses.get(each, 1.0) <= TOLERATED_LOSS + ACCURACY_TOLERANCE]

    def profile_with(
        self, profile: ProfileTable, floating: Collection[SubNetwork], config: SuperViTConfig
    ) -> ProfileTable:
        """Return the profile in 8 bits, with the rows of what runs in floating point taken from `profile`.

        Args:
            profile: the profile in floating point.
            floating: the trained sub-networks that run in floating point; keep rates next to one of them do as well.
            config: the model's architecture.

        Returns:
            A profile without cascades that mix 8 bits and floating point; rows in floating point have SLOWNESS.
        """
        is_floating = {
            row.subnetwork: not config.nearest_trained(row.subnetwork).isdisjoint(floating)
            for row in (*self.profile.rows, *profile.rows)
        }
        rows = [row for row in self.profile.rows if not is_floating[row.subnetwork]]
        rows += [replace(row, slowness=SLOWNESS) for row in profile.rows if is_floating[row.subnetwork]]
        cascades = [
            each
            for table, kind in ((self.profile, False), (profile, True))
            for each in table.cascades
            if is_floating[each.first] == is_floating[each.second] == kind
        ]
        return ProfileTable(tuple(rows), tuple(cascades))
