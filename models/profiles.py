"""What is known of each sub-network: its cost and its measured accuracy, as one table.

Runs without torch. Which row to serve is a policy's business, not this table's.
"""

from dataclasses import dataclass
from functools import cached_property

from models.flops import count_macs
from models.subnetwork import SubNetwork, SuperViTConfig


@dataclass(frozen=True, slots=True)
class SubNetworkProfile:
    """One row.

    Attributes:
        subnetwork: whose row it is.
        macs: multiply-accumulates of one image, at least 1.
        top1, top5: measured accuracy, fractions 0..1; None where nobody measured.

    Raises:
        ValueError: a value is outside its range.
    """

    subnetwork: SubNetwork
    macs: int
    top1: float | None = None
    top5: float | None = None

    def __post_init__(self) -> None:
        if self.macs < 1:
            raise ValueError(f"MACs must be at least 1, not {self.macs}")
        for name, value in (("top1", self.top1), ("top5", self.top5)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in 0..1, not {value}")

    @property
    def gflops(self) -> float:
        """Cost in the literature's unit, 1e9 multiply-accumulates."""
        return self.macs / 1e9


@dataclass(frozen=True)
class ProfileTable:
    """The rows of one checkpoint, cheapest first."""

    rows: tuple[SubNetworkProfile, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("a profile needs at least one row")
        object.__setattr__(self, "rows", tuple(sorted(self.rows, key=lambda row: (row.macs, row.subnetwork))))
        if len(self.by_subnetwork) != len(self.rows):
            raise ValueError("a profile has at most one row per sub-network")

    @cached_property
    def by_subnetwork(self) -> dict[SubNetwork, SubNetworkProfile]:
        """The rows by their sub-network."""
        return {row.subnetwork: row for row in self.rows}

    @cached_property
    def is_measured(self) -> bool:
        """Whether the accuracy of every row is known."""
        return all(row.top1 is not None for row in self.rows)

    @property
    def cheapest(self) -> SubNetworkProfile:
        """The row of fewest multiply-accumulates."""
        return self.rows[0]

    @cached_property
    def frontier(self) -> tuple[SubNetworkProfile, ...]:
        """The rows that no cheaper row equals or beats, cheapest first.

        Where accuracy is not known for every row, each row counts as better than all that cost less.
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

    @classmethod
    def unmeasured(cls, config: SuperViTConfig) -> "ProfileTable":
        """List the trained family of `config` with its costs, accuracy unknown."""
        return cls(tuple(SubNetworkProfile(sub, count_macs(config, sub)) for sub in config.subnetworks))
