"""How long a batch takes on one machine: measured seconds by sub-network and batch size, with interpolation.

Runs without torch. The service measures the figures and stores them.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from models.subnetwork import SubNetwork


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Median seconds per batch, by sub-network and batch size.

    Attributes:
        batch_sizes: the measured sizes, strictly ascending from 1.
        seconds: for each sub-network, one figure per measured batch size.
        is_padded: whether a batch of a size in between is padded to the next measured size, and takes as long.

    Raises:
        ValueError: the sizes do not ascend from 1, there is no sub-network, or its figures do not match the sizes or
            are not positive numbers.
    """

    batch_sizes: tuple[int, ...]
    seconds: Mapping[SubNetwork, tuple[float, ...]]
    is_padded: bool = False

    def __post_init__(self) -> None:
        sizes = self.batch_sizes
        if not sizes or sizes[0] != 1 or list(sizes) != sorted(set(sizes)):
            raise ValueError(f"batch sizes must ascend from 1, not {sizes}")
        if not self.seconds:
            raise ValueError("a latency table needs at least one sub-network")
        for subnetwork, figures in self.seconds.items():
            if len(figures) != len(sizes):
                raise ValueError(f"{len(figures)} figures for {len(sizes)} batch sizes at {subnetwork}")
            if not all(math.isfinite(figure) and figure > 0 for figure in figures):
                raise ValueError(f"every latency must be a positive number of seconds, not {figures} at {subnetwork}")

    @property
    def max_batch_size(self) -> int:
        """The largest batch that was measured; nothing is known beyond it."""
        return self.batch_sizes[-1]

    def row(self, subnetwork: SubNetwork) -> tuple[float, ...]:
        """Return the seconds of every batch size from 1 to the largest, never falling; gaps are interpolated or padded.

        Raises:
            KeyError: this sub-network was not measured.
        """
        figures = self.seconds[subnetwork]
        floor, row = 0.0, []
        for size in range(1, self.max_batch_size + 1):
            above = bisect_left(self.batch_sizes, size)
            seconds = figures[above]
            if self.batch_sizes[above] != size and not self.is_padded:
                low, high = self.batch_sizes[above - 1], self.batch_sizes[above]
                share = (size - low) / (high - low)
                seconds = figures[above - 1] * (1 - share) + figures[above] * share
            floor = max(floor, seconds)  # a larger batch that measured faster is noise
            row.append(floor)
        return tuple(row)
