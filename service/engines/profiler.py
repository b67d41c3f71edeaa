"""Measures what a batch of each sub-network takes on this machine."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from statistics import median, median_low

import torch

from models.latency import LatencyTable
from models.subnetwork import SubNetwork
from service.engines.base import Run

Cell = tuple[SubNetwork, int]

BUDGET_S = 15.0
MIN_RUNS = 3
# A batch that takes this long runs twice, its first time included: what a library prepares for a new shape, some 50 ms,
# matters little to it, and the lower of two figures is without it.
SLOW_S = 0.1
MIN_SLOW_RUNS = 2
WARM_UP_S = 4.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured.

    Attributes:
        table: median seconds by sub-network and batch size.
        spread: for each sub-network, by batch size: median distance from the median, as a fraction of it.
        measured_at: when it began, ISO 8601 in UTC.
    """

    table: LatencyTable
    spread: Mapping[SubNetwork, tuple[float, ...]]
    measured_at: str


def measure(
    run: Run,
    image_side: int,
    subnetworks: Sequence[SubNetwork],
    batch_sizes: Sequence[int],
    *,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurement:
    """Time every sub-network at every batch size, round by round, so that a disturbance does not hit one of them alone.

    Goes on until the budget is spent, and at least until each batch has run three times, or twice if it is slow. The
    first run of each, which pays for first-time work, does not count unless it is slow.

    Args:
        run: an engine's.
        image_side: S, of the images that it takes, in pixels.
        subnetworks: what to time.
        batch_sizes: ascending from 1.
        budget_s: time after which no further round begins.
        clock: monotonic, in seconds.
    """
    began_at = datetime.now(UTC)
    images = torch.randint(0, 256, (max(batch_sizes), 3, image_side, image_side), dtype=torch.uint8)

    def time_once(cell: Cell) -> float:
        subnetwork, batch_size = cell
        started_at = clock()
        run(images[:batch_size], subnetwork)
        return clock() - started_at

    ends_at = clock() + budget_s
    first = {cell: time_once(cell) for cell in cells_of(subnetworks, batch_sizes)}
    needed = {cell: MIN_SLOW_RUNS if seconds >= SLOW_S else MIN_RUNS for cell, seconds in first.items()}
    runs = {cell: [seconds] if seconds >= SLOW_S else [] for cell, seconds in first.items()}
    order = random.Random(0)
    while due := [cell for cell in runs if clock() < ends_at or len(runs[cell]) < needed[cell]]:
        for cell in order.sample(due, len(due)):
            runs[cell].append(time_once(cell))
    medians = {cell: median_low(figures) for cell, figures in runs.items()}
    spread = {cell: median(abs(s - medians[cell]) for s in figures) / medians[cell] for cell, figures in runs.items()}
    return measurement_of(medians, spread, began_at)


def warm_up_shapes(
    run: Run,
    image_side: int,
    subnetworks: Sequence[SubNetwork],
    max_batch_size: int,
    *,
    budget_s: float = WARM_UP_S,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Run batches of every size once, small ones first, as far as the time allows.

    The first batch of a shape takes some milliseconds longer, and the first to be asked for by clients would be late.
    """
    ends_at = clock() + budget_s
    images = torch.zeros(max_batch_size, 3, image_side, image_side, dtype=torch.uint8)
    for batch_size, subnetwork in product(range(1, max_batch_size + 1), subnetworks):
        if clock() >= ends_at:
            return
        run(images[:batch_size], subnetwork)


def measurement_of(seconds: Mapping[Cell, float], spread: Mapping[Cell, float], measured_at: datetime) -> Measurement:
    """Arrange figures by sub-network and batch size."""
    subnetworks = dict.fromkeys(subnetwork for subnetwork, _ in seconds)
    batch_sizes = tuple(dict.fromkeys(batch_size for _, batch_size in seconds))

    def by_subnetwork(figures: Mapping[Cell, float]) -> dict[SubNetwork, tuple[float, ...]]:
        return {subnetwork: tuple(figures[subnetwork, size] for size in batch_sizes) for subnetwork in subnetworks}

    table = LatencyTable(batch_sizes, by_subnetwork(seconds))
    return Measurement(table, by_subnetwork(spread), measured_at.isoformat(timespec="seconds"))


def cells_of(subnetworks: Sequence[SubNetwork], batch_sizes: Sequence[int]) -> list[Cell]:
    """List what there is to measure."""
    return [(subnetwork, batch_size) for subnetwork in subnetworks for batch_size in batch_sizes]
