"""A latency profile of this machine that is used while it is measured: the cells not measured yet are estimated.

Untrained keep rates are estimated from those on both sides, unless an earlier run or batches of requests measure them
before the trained ones are all measured: there are three times as many untrained ones, and a library keeps megabytes
for each batch shape. Only the engine's thread changes the profile. Measured figures are never dropped. Callers decide
when to measure.
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

# Weight of a batch of requests as a run of its cell, where a run of an otherwise idle engine counts 1: the machine was
# busy with requests, and how much slower that made it is known from other batches only.
SERVED_RUN_WEIGHT = 0.5
KNOWN = 0.3  # share of a cell's measurement above which its figure is used: one run of three


@dataclass(slots=True)
class _Runs:
    """The runs of one cell.

    Attributes:
        seconds: seconds of each run that counts.
        worth: sum of the weights of these runs.
        has_run: whether the engine has run this shape before.
        spread: the spread that was stored with the figure; None where the cell is measured by this process.
    """

    seconds: list[float] = field(default_factory=list)
    worth: float = 0.0
    has_run: bool = False
    spread: float | None = None

    @property
    def done(self) -> float:
        """Share of the measurement that is done; 1 or more once it is complete."""
        if self.spread is not None:
            return 1.0
        return self.worth / (MIN_SLOW_RUNS if self.seconds and min(self.seconds) >= SLOW_S else MIN_RUNS)

    @property
    def is_measured(self) -> bool:
        """Whether the measurement is complete."""
        return self.done >= 1


@dataclass(frozen=True, slots=True)
class Prediction:
    """The latencies to plan with.

    Attributes:
        likely: measured latencies, and estimates of the others.
        cautious: the same, with the error added to each estimate.
        error: error of the estimates, as a fraction of them.
    """

    likely: LatencyTable
    cautious: LatencyTable
    error: float


class GrowingProfile:
    """The latencies of every sub-network at every batch size, as far as they are known."""

    def __init__(
        self,
        profiles: ProfileTable,
        batch_sizes: tuple[int, ...],
        kept: Figures | None = None,
        *,
        is_padded: bool = False,
    ) -> None:
        """Create a profile that starts with stored figures.

        Args:
            profiles: the sub-networks and their cost.
            batch_sizes: ascending from 1.
            kept: stored figures of some or all of the cells; None for none.
            is_padded: as in LatencyTable.
        """
        self.batch_sizes, self._is_padded = batch_sizes, is_padded
        self._work = {row.subnetwork: row.work for row in profiles.rows}
        trained = {row.subnetwork for row in profiles.rows if row.is_trained}
        self._runs = {cell: _Runs() for cell in cells_of(list(self._work), batch_sizes)}
        self._left = dict.fromkeys(cell for cell in self._runs if cell[0] in trained)  # to be measured, in order
        self._num_due = len(self._left)
        self._began_at = datetime.now(UTC)
        self._expected_s: Mapping[Cell, float] = {}
        if kept is not None:
            self.merge(kept)

    @property
    def measured_share(self) -> float:
        """Share of the cells to measure that is measured, 0..1; each run counts as a part of its cell.

        Any thread may read it while another one records.
        """
        return 1.0 - sum(1.0 - self._runs[cell].done for cell in tuple(self._left)) / self._num_due

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
        """The figures worth storing: those of the measured cells."""
        seconds, spread = {}, {}
        for cell, runs in self._runs.items():
            if runs.is_measured:
                seconds[cell], found = middle_of(runs.seconds)
                spread[cell] = found if runs.spread is None else runs.spread
        return Figures(seconds, spread, self._began_at)

    def merge(self, kept: Figures) -> None:
        """Take over figures of an earlier start or of another process, for cells that are not measured here."""
        for cell, seconds in kept.seconds.items():
            if cell in self._runs and not self._runs[cell].is_measured:
                self._began_at = min(self._began_at, kept.measured_at)
                self._runs[cell] = _Runs([seconds], MIN_RUNS, True, kept.spread[cell])
                self._left.pop(cell, None)

    def seconds(self, cell: Cell) -> float | None:
        """Return the seconds of a measured cell; None for any other."""
        runs = self._runs.get(cell)
        return middle_of(runs.seconds)[0] if runs is not None and runs.is_measured else None

    def record(self, cell: Cell, seconds: float, worth: float = 1.0) -> bool:
        """Record a run of a cell with a weight, and return whether it counts.

        Runs of unknown or measured cells do not count. The first run of a shape, in which a library does first-time
        work, does not count unless it is slow.
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
        """Estimate the seconds of a cell from the cells that are known so far; 0 where there are none."""
        known = self._known()
        return LatencyEstimate(known, self._work).seconds([cell])[0] if known else 0.0

    def predicted_s(self, cell: Cell) -> float:
        """Return the seconds of a batch of any size, as last predicted by `predict`."""
        subnetwork, batch_size = cell
        return self._likely.row(subnetwork)[batch_size - 1]

    def due(self, fits: Callable[[Cell, float], bool]) -> tuple[Cell, float] | None:
        """Choose the cell to run next, round by round, cheap batches before expensive ones.

        Args:
            fits: takes a cell and its expected seconds, and returns whether there are room and time for it.

        Returns:
            The cell and its expected seconds; None where no cell is left that fits.
        """
        expected_s = self._expected_s
        left = [cell for cell in self._left if fits(cell, expected_s[cell])]
        if not left:
            return None
        due = min(left, key=lambda cell: (self._runs[cell].done, expected_s[cell]))
        return due, expected_s[due]

    def predict(self) -> Prediction:
        """Return the measured latencies and estimates of all others; `due` and `predicted_s` use these from then on.

        Raises:
            ValueError: no cell is known.
        """
        known = self._known()
        if not known:
            raise ValueError("no cell is measured from which to estimate the others")
        estimate = LatencyEstimate(known, self._work)
        estimated = zip(self._runs, estimate.seconds(list(self._runs)), strict=True)
        self._expected_s = likely = {cell: known.get(cell, seconds) for cell, seconds in estimated}
        cautious = {cell: seconds * (1 if cell in known else 1 + estimate.error) for cell, seconds in likely.items()}
        self._likely = self._table(likely)
        return Prediction(self._likely, self._table(cautious), estimate.error)

    def _known(self) -> dict[Cell, float]:
        """Return the figures of the cells of whose measurement more than KNOWN is done."""
        return {cell: middle_of(runs.seconds)[0] for cell, runs in self._runs.items() if runs.done > KNOWN}

    def _table(self, seconds: Mapping[Cell, float]) -> LatencyTable:
        rows = {sub: tuple(seconds[sub, size] for size in self.batch_sizes) for sub in self._work}
        return LatencyTable(self.batch_sizes, rows, self._is_padded)


def untimed_shapes(subnetworks: Sequence[SubNetwork], batch_sizes: tuple[int, ...]) -> list[Cell]:
    """Return the cells of sizes between the measured ones, for which a library must do first-time work as well."""
    between = [size for size in range(1, batch_sizes[-1]) if size not in batch_sizes]
    return [(subnetwork, size) for size in between for subnetwork in subnetworks]


def first_cells(profiles: ProfileTable, batch_sizes: tuple[int, ...]) -> list[Cell]:
    """Return the cells from which to estimate the others, the most informative first.

    These are the sub-networks of the least, the most and a middling work, at batches of 1, 4 and the largest size.
    """
    trained = sorted((row for row in profiles.rows if row.is_trained), key=attrgetter("work"))
    half = (trained[0].work + trained[-1].work) / 2
    middle = min(trained, key=lambda row: abs(row.work - half))
    subnetworks: list[SubNetwork] = [row.subnetwork for row in (trained[0], trained[-1], middle)]
    sizes = dict.fromkeys((1, *(size for size in batch_sizes if size == 4), batch_sizes[-1]))
    return [(subnetwork, size) for size in sizes for subnetwork in dict.fromkeys(subnetworks)]
