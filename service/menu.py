"""What the policy may choose from: sub-networks with their accuracy, their cost and how long each batch takes here.

Runs without torch. Chooses nothing.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from models.latency import LatencyTable
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from service.errors import BudgetTooSmallError, InvalidParameterError

Rows = Sequence[Sequence[float]]  # seconds by option and then by batch size, less one


@dataclass(frozen=True, slots=True)
class Option:
    """One sub-network.

    Attributes:
        row: its cost and accuracy.
        seconds: profiled latency of batches of 1, 2, 3, ..., never falling.
    """

    row: SubNetworkProfile
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Menu:
    """Every sub-network that can be had.

    Attributes:
        options: first the levels: the accuracy frontier of the trained sub-networks, cheapest first, along
            which the policy moves. Then those between them, which serve to hit a budget closely, and those that a
            cheaper one equals, which can be had by name only. As levels, the former would divide those who wait among
            more sub-networks, hence smaller batches, for next to no accuracy.
        num_levels: how many of the options are levels.
        frontier: indices of all options that no cheaper one equals, cheapest first; every level is one of them.
        is_measured: whether the accuracies are known.
    """

    options: tuple[Option, ...]
    num_levels: int
    frontier: tuple[int, ...]
    is_measured: bool

    @classmethod
    def of(cls, profiles: ProfileTable, latencies: LatencyTable) -> "Menu":
        """Join accuracy and latency; a level never counts as faster than a lower one, because that would be noise.

        Raises:
            KeyError: a sub-network of the profile has no latency.
        """
        trained = ProfileTable(tuple(row for row in profiles.rows if row.is_trained)).frontier
        levels: list[Option] = []
        for row in trained:
            seconds = latencies.row(row.subnetwork)
            if levels:
                seconds = tuple(map(max, seconds, levels[-1].seconds))
            levels.append(Option(row, seconds))
        others = [row for row in profiles.rows if row not in trained]
        options = (*levels, *(Option(row, latencies.row(row.subnetwork)) for row in others))
        index = {option.row: number for number, option in enumerate(options)}
        eligible = [row for row in others if not row.is_trained and _is_below_dearer(row, trained)]
        frontier = ProfileTable((*trained, *eligible)).frontier
        return cls(options, len(levels), tuple(index[row] for row in frontier), profiles.is_measured)

    @property
    def max_batch_size(self) -> int:
        """The largest batch whose latency is known."""
        return len(self.options[0].seconds)

    @property
    def best(self) -> Option:
        """The most accurate level."""
        return self.options[self.num_levels - 1]

    def best_within(self, budget_gflops: float | None) -> tuple[int, int]:
        """Find what a budget admits, compared in the number that clients are shown.

        Returns:
            The highest level whose cost is within the budget, and the index of the most accurate option that is.

        Raises:
            BudgetTooSmallError: nothing fits; names the smallest budget that would do.
        """
        if budget_gflops is None:
            return self.num_levels - 1, self.num_levels - 1
        _require_budget(budget_gflops, self.options[0].row, "the cheapest sub-network costs")
        levels = self.options[: self.num_levels]  # costs ascend, as they do along the frontier
        level = bisect_right(levels, budget_gflops, key=lambda option: option.row.gflops) - 1
        place = bisect_right(self.frontier, budget_gflops, key=lambda index: self.options[index].row.gflops) - 1
        return level, self.frontier[place]

    def next_better(self, index: int) -> SubNetworkProfile | None:
        """Return the next option on the frontier, None behind the best."""
        place = self.frontier.index(index) + 1
        return self.options[self.frontier[place]].row if place < len(self.frontier) else None

    def index_of(self, subnetwork: SubNetwork, budget_gflops: float | None) -> int:
        """Find an option by its name.

        Raises:
            BudgetTooSmallError: it costs more than the budget.
            InvalidParameterError: there is no such option.
        """
        for index, option in enumerate(self.options):
            if option.row.subnetwork == subnetwork:
                _require_budget(budget_gflops, option.row, f"{subnetwork} costs")
                return index
        raise InvalidParameterError(
            f"{subnetwork} is not one of this model's sub-networks; GET /subnetworks lists them",
            parameter="patch_grid, keep_rate",
        )


def _is_below_dearer(row: SubNetworkProfile, levels: Sequence[SubNetworkProfile]) -> bool:
    """Tell whether the next dearer level is more accurate: an untrained rate that measures better does so by chance."""
    dearer = next((level for level in levels if level.macs > row.macs), None)
    return dearer is not None and (row.top1 is None or dearer.top1 is None or row.top1 < dearer.top1)


def fits(row: SubNetworkProfile, budget_gflops: float | None) -> bool:
    """Tell whether `row` costs no more than the budget, compared in the very number that clients are shown."""
    return budget_gflops is None or row.gflops <= budget_gflops


def _require_budget(budget_gflops: float | None, row: SubNetworkProfile, who: str) -> None:
    if not fits(row, budget_gflops):
        raise BudgetTooSmallError(
            f"a budget of {budget_gflops:.12g} GFLOPs is too small: {who} {row.gflops}",
            smallest_budget_gflops=row.gflops,
        )
