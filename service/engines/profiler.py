"""Measures how long a batch of each sub-network takes on this machine."""

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median, median_low

import torch

from models.latency import LatencyTable
from models.latency_estimate import Cell
from models.subnetwork import SubNetwork
from service.engines.base import Prepare, Run

BUDGET_S = 15.0
MIN_RUNS = 3
# A batch that takes this many seconds runs only twice, its first run included: a library's first-time work for a new
# shape, some 50 ms, matters little to it, and the lower of the two figures is without that work.
SLOW_S = 0.1
MIN_SLOW_RUNS = 2

Track = Callable[[Sequence[Cell]], Iterable[Cell]]


@dataclass(frozen=True, slots=True)
class Figures:
    """Measured latencies of some or all cells.

    Attributes:
        seconds: median by cell.
        spread: by cell, median distance from the median, as a fraction of it.
        measured_at: when measuring began.
    """

    seconds: Mapping[Cell, float]
    spread: Mapping[Cell, float]
    measured_at: datetime


@dataclass(frozen=True, slots=True)
class Measurement:
    """A complete latency profile.

    Attributes:
        table: median seconds by sub-network and batch size.
        spread: for each sub-network, by batch size: median distance from the median, as a fraction of it.
        measured_at: when measuring began, ISO 8601 in UTC.
    """

    table: LatencyTable
    spread: Mapping[SubNetwork, tuple[float, ...]]
    measured_at: str


def measure(
    run: Run,
    image_side: int,
    cells: Sequence[Cell],
    *,
    prepare: Prepare = lambda *_: None,
    budget_s: float = BUDGET_S,
    track: Track = iter,
    clock: Callable[[], float] = time.perf_counter,
) -> Figures:
    """Time cells, round by round, so that a disturbance does not hit one of them alone.

    Measuring continues until the budget is spent, and at least until each batch has three runs that count, or two if it
    is slow. The first run of each batch, which includes first-time work, does not count unless it is slow.

    Args:
        run: an engine's `run`.
        image_side: S, in pixels, of the images that the engine takes.
        cells: what to time; not empty.
        prepare: the engine's `prepare`; its time does not count.
        budget_s: seconds after which no further round begins.
        track: passes on the cells of each round in turn, and may show how far the round is.
        clock: monotonic, in seconds.
    """
    began_at = datetime.now(UTC)
    time_once = stopwatch(run, image_side, max(size for _, size in cells), clock, prepare)
    ends_at = clock() + budget_s
    first = {cell: time_once(cell) for cell in track(cells)}
    needed = {cell: MIN_SLOW_RUNS if seconds >= SLOW_S else MIN_RUNS for cell, seconds in first.items()}
    runs = {cell: [seconds] if seconds >= SLOW_S else [] for cell, seconds in first.items()}
    order = random.Random(0)
    while due := [cell for cell in runs if clock() < ends_at or len(runs[cell]) < needed[cell]]:
        for cell in track(order.sample(due, len(due))):
            runs[cell].append(time_once(cell))
    middle = {cell: middle_of(figures) for cell, figures in runs.items()}
    seconds, spread = ({cell: pair[part] for cell, pair in middle.items()} for part in (0, 1))
    return Figures(seconds, spread, began_at)


def stopwatch(
    run: Run,
    image_side: int,
    max_batch_size: int,
    clock: Callable[[], float] = time.perf_counter,
    prepare: Prepare = lambda *_: None,
) -> Callable[[Cell], float]:
    """Return a function that prepares a cell, runs it once on noise, and returns the seconds of the run."""
    images = torch.randint(0, 256, (max_batch_size, 3, image_side, image_side), dtype=torch.uint8)

    def time_once(cell: Cell) -> float:
        subnetwork, batch_size = cell
        prepare(subnetwork, batch_size)
        started_at = clock()
        run(images[:batch_size], subnetwork)
        return clock() - started_at

    return time_once


def middle_of(figures: Sequence[float]) -> tuple[float, float]:
    """Return the lower median of some seconds, and the median distance from it, as a fraction of it."""
    middle = median_low(figures)
    return middle, median(abs(seconds - middle) for seconds in figures) / middle


def measurement_of(figures: Figures, *, is_padded: bool = False) -> Measurement:
    """Arrange the figures of a complete profile by sub-network and batch size; `is_padded` as in LatencyTable."""
    subnetworks = dict.fromkeys(subnetwork for subnetwork, _ in figures.seconds)
    batch_sizes = tuple(dict.fromkeys(batch_size for _, batch_size in figures.seconds))

    def by_subnetwork(by_cell: Mapping[Cell, float]) -> dict[SubNetwork, tuple[float, ...]]:
        return {subnetwork: tuple(by_cell[subnetwork, size] for size in batch_sizes) for subnetwork in subnetworks}

    table = LatencyTable(batch_sizes, by_subnetwork(figures.seconds), is_padded)
    return Measurement(table, by_subnetwork(figures.spread), figures.measured_at.isoformat(timespec="seconds"))


def cells_of(subnetworks: Sequence[SubNetwork], batch_sizes: Sequence[int]) -> list[Cell]:
    """Return every pair of a sub-network and a batch size."""
    return [(subnetwork, batch_size) for subnetwork in subnetworks for batch_size in batch_sizes]
