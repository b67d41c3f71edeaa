"""A profile of this machine that is used while it is measured: the cells not measured yet are estimated.

Untrained keep rates stay estimates, from those on both sides, unless an earlier run or requests' batches say more
before the others are measured: there are three times as many of them, and for each shape of batch a library keeps
megabytes. One thread changes the profile, the engine's. What was measured is never forgotten; when to measure is for
others to decide.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import attrgetter

from models.latency import LatencyTable
from models.latency_estimate import Cell, LatencyEstimate
from models.profiles import ProfileTable
from models.subnetwork import SubNetwork
from service.engines.profiler import MIN_RUNS, MIN_SLOW_RUNS, SLOW_S, Figures, cells_of, middle_of

# What a batch of a request's says of its cell, where a run of an engine that does nothing else says 1: the machine was
# busy with requests, and how much slower that made it is known from other batches only.
SERVED_WORTH = 0.5
KNOWN = 0.3  # of what makes a cell measured: one run of three


@dataclass(slots=True)
class _Runs:
    """Of one cell.

    Attributes:
        seconds: of the runs that count.
        worth: runs that they are worth.
        has_run: whether its shape is known to the engine.
        spread: that was kept with its figure; None where it was measured now.
    """

    seconds: list[float] = field(default_factory=list)
    worth: float = 0.0
    has_run: bool = False
    spread: float | None = None

    @property
    def done(self) -> float:
        """How much of the measurement is done; it is once this is 1 or more."""
        if self.spread is not None:
            return 1.0
        return self.worth / (MIN_SLOW_RUNS if self.seconds and min(self.seconds) >= SLOW_S else MIN_RUNS)

    @property
    def is_measured(self) -> bool:
        """Whether all of it is done."""
        return self.done >= 1


@dataclass(frozen=True, slots=True)
class Prediction:
    """The latencies to plan with.

    Attributes:
        likely: measured, or else estimated.
        cautious: the same, with the error of an estimate on top of it.
        error: that of the estimates, as a fraction of them.
    """

    likely: LatencyTable
    cautious: LatencyTable
    error: float


class GrowingProfile:
    """What is known of every sub-network at every batch size."""

    def __init__(
        self,
        profiles: ProfileTable,
        batch_sizes: tuple[int, ...],
        kept: Figures | None = None,
        *,
        is_padded: bool = False,
    ) -> None:
        """Begin with what was kept, which may be nothing.

        Args:
            profiles: the sub-networks and their cost.
            batch_sizes: ascending from 1.
            kept: of a part of them, or of all.
            is_padded: as of a LatencyTable.
        """
        self.batch_sizes, self._is_padded = batch_sizes, is_padded
        self._work = {row.subnetwork: row.work for row in profiles.rows}
        trained = {row.subnetwork for row in profiles.rows if row.is_trained}
        self._runs = {cell: _Runs() for cell in cells_of(list(self._work), batch_sizes)}
        self._left = dict.fromkeys(cell for cell in self._runs if cell[0] in trained)  # to be measured, in order
        self._num_due = len(self._left)
        self._began_at = datetime.now(UTC) if kept is None else kept.measured_at
        self._expected_s: Mapping[Cell, float] = {}
        if kept is not None:
            self.merge(kept)

    @property
    def measured_share(self) -> float:
        """How much of what is to be measured is, 0..1, a run of a cell counting as a part of it."""
        return 1.0 - sum(1.0 - self._runs[cell].done for cell in self._left) / self._num_due

    @property
    def is_complete(self) -> bool:
        """Whether every cell of the trained sub-networks is measured."""
        return not self._left

    @property
    def began_at(self) -> datetime:
        """When the first of its figures was measured."""
        return self._began_at

    @property
    def figures(self) -> Figures:
        """What is worth keeping: the cells that are measured."""
        seconds, spread = {}, {}
        for cell, runs in self._runs.items():
            if runs.is_measured:
                seconds[cell], found = middle_of(runs.seconds)
                spread[cell] = found if runs.spread is None else runs.spread
        return Figures(seconds, spread, self._began_at)

    def merge(self, kept: Figures) -> None:
        """Take over what was measured in an earlier start or by another process, where nothing is measured here."""
        for cell, seconds in kept.seconds.items():
            if cell in self._runs and not self._runs[cell].is_measured:
                self._runs[cell] = _Runs([seconds], MIN_RUNS, True, kept.spread[cell])
                self._left.pop(cell, None)

    def seconds(self, cell: Cell) -> float | None:
        """Return what a measured cell takes; None for one that is not measured, or no cell."""
        runs = self._runs.get(cell)
        return middle_of(runs.seconds)[0] if runs is not None and runs.is_measured else None

    def record(self, cell: Cell, seconds: float, worth: float = 1.0) -> bool:
        """Count a run, as so much of one; nothing where it is no cell, or measured. Returns whether it counts.

        The first of a shape, for which a library prepares itself, does not unless it is slow.
        """
        runs = self._runs.get(cell)
        if runs is None or runs.is_measured:
            return False
        counts = runs.has_run or seconds >= SLOW_S
        if counts:
            runs.seconds.append(seconds)
            runs.worth += worth
        runs.has_run = True
        if runs.is_measured:
            self._left.pop(cell, None)
        return counts

    def expected_s(self, cell: Cell) -> float:
        """Tell what a cell takes, measured or estimated from those measured so far; 0 where there are none."""
        known = self._known()
        return LatencyEstimate(known, self._work).seconds([cell])[0] if known else 0.0

    def row_s(self, cell: Cell) -> float:
        """Tell what a batch of any size will take, as last predicted."""
        subnetwork, batch_size = cell
        return self._likely.row(subnetwork)[batch_size - 1]

    def due(self, fits: Callable[[Cell, float], bool]) -> tuple[Cell, float] | None:
        """Choose what to run next, round by round, cheap batches before dear ones.

        Args:
            fits: whether there is room for a cell, and time for the seconds that it will take.

        Returns:
            The cell and the seconds that it will take; None where nothing is left that fits.
        """
        expected_s = self._expected_s
        left = [cell for cell in self._left if fits(cell, expected_s[cell])]
        if not left:
            return None
        due = min(left, key=lambda cell: (self._runs[cell].done, expected_s[cell]))
        return due, expected_s[due]

    def predict(self) -> Prediction:
        """Arrange what is measured, and estimates of all else, for those who plan; `due` goes by the same.

        Raises:
            ValueError: nothing at all is measured.
        """
        known = self._known()
        if not known:
            raise ValueError("nothing is measured that others could be estimated from")
        estimate = LatencyEstimate(known, self._work)
        estimated = zip(self._runs, estimate.seconds(list(self._runs)), strict=True)
        self._expected_s = likely = {cell: known.get(cell, seconds) for cell, seconds in estimated}
        cautious = {cell: seconds * (1 if cell in known else 1 + estimate.error) for cell, seconds in likely.items()}
        self._likely = self._table(likely)
        return Prediction(self._likely, self._table(cautious), estimate.error)

    def _known(self) -> dict[Cell, float]:
        """Return the figures of the cells that have run at all."""
        return {cell: middle_of(runs.seconds)[0] for cell, runs in self._runs.items() if runs.done > KNOWN}

    def _table(self, seconds: Mapping[Cell, float]) -> LatencyTable:
        rows = {sub: tuple(seconds[sub, size] for size in self.batch_sizes) for sub in self._work}
        return LatencyTable(self.batch_sizes, rows, self._is_padded)


def untimed_shapes(subnetworks: Sequence[SubNetwork], batch_sizes: tuple[int, ...]) -> list[Cell]:
    """Name the batches of sizes between those that are measured, which a library must prepare itself for, too."""
    between = [size for size in range(1, batch_sizes[-1]) if size not in batch_sizes]
    return [(subnetwork, size) for size in between for subnetwork in subnetworks]


def first_cells(profiles: ProfileTable, batch_sizes: tuple[int, ...]) -> list[Cell]:
    """Name the cells from which the others are estimated, the most telling first.

    Those of the least, the most and a middling work, at batches of 1, 4 and the most.
    """
    trained = sorted((row for row in profiles.rows if row.is_trained), key=attrgetter("work"))
    half = (trained[0].work + trained[-1].work) / 2
    middle = min(trained, key=lambda row: abs(row.work - half))
    subnetworks: list[SubNetwork] = [row.subnetwork for row in (trained[0], trained[-1], middle)]
    sizes = dict.fromkeys((1, *(size for size in batch_sizes if size == 4), batch_sizes[-1]))
    return [(subnetwork, size) for size in sizes for subnetwork in dict.fromkeys(subnetworks)]
