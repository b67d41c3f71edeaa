"""Measures what a batch of each sub-network takes on this machine, and keeps the figures from one start to the next."""

import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import median, median_low

import torch
from filelock import FileLock, Timeout
from pydantic import AwareDatetime, BaseModel, NonNegativeFloat, PositiveFloat
from torch import Tensor

from models.latency import LatencyTable
from models.subnetwork import SubNetwork

logger = logging.getLogger(__name__)

Run = Callable[[Tensor, SubNetwork], Tensor]
Cell = tuple[SubNetwork, int]

FORMAT = 1
BATCH_SIZES = (1, 2, 4, 8, 16)
BUDGET_S = 15.0
MIN_RUNS = 3
# A batch that takes this long runs twice, its first time included: what a library prepares for a new shape, some 50 ms,
# matters little to it, and the lower of two figures is without it.
SLOW_S = 0.1
MIN_SLOW_RUNS = 2
REHEARSAL_S = 4.0


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
    batch_sizes: Sequence[int] = BATCH_SIZES,
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
    first = {cell: time_once(cell) for cell in _cells(subnetworks, batch_sizes)}
    needed = {cell: MIN_SLOW_RUNS if seconds >= SLOW_S else MIN_RUNS for cell, seconds in first.items()}
    runs = {cell: [seconds] if seconds >= SLOW_S else [] for cell, seconds in first.items()}
    order = random.Random(0)
    while due := [cell for cell in runs if clock() < ends_at or len(runs[cell]) < needed[cell]]:
        for cell in order.sample(due, len(due)):
            runs[cell].append(time_once(cell))
    medians = {cell: median_low(figures) for cell, figures in runs.items()}
    spread = {cell: median(abs(s - medians[cell]) for s in figures) / medians[cell] for cell, figures in runs.items()}
    return _measurement(medians, spread, began_at)


def rehearse(
    run: Run,
    image_side: int,
    subnetworks: Sequence[SubNetwork],
    max_batch_size: int,
    *,
    budget_s: float = REHEARSAL_S,
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


def load_or_measure(
    folder: Path,
    run: Run,
    *,
    image_side: int,
    subnetworks: Sequence[SubNetwork],
    batch_sizes: Sequence[int],
    checkpoint_version: str,
    engine: str,
    fresh: bool = False,
    is_stopping: Callable[[], bool] = lambda: False,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurement:
    """Read the latencies that were measured before under the same conditions, or else measure and keep them.

    A kept file that cannot be used is measured anew, and a folder that cannot be written to is lived with; the log
    says so.

    Args:
        folder: where the files are kept, one for each set of conditions; made if there is none.
        run: an engine's.
        image_side: S, of the images that it takes, in pixels.
        subnetworks: what to time.
        batch_sizes: ascending from 1.
        checkpoint_version: of the weights.
        engine: its description of itself: library, device, precision, threads.
        fresh: measure even if there is a file.
        is_stopping: whether to wait no longer for another process that measures; `run` may then refuse to run.
        budget_s: time after which no further round begins.
        clock: monotonic, in seconds.
    """
    conditions: dict[str, str | int] = {
        "format": FORMAT,
        "checkpoint_version": checkpoint_version,
        "engine": engine,
        "cpus": _num_cpus(),
    }
    cells = _cells(subnetworks, batch_sizes)
    key = json.dumps([conditions, [(*astuple(subnetwork), batch_size) for subnetwork, batch_size in cells]])
    path = folder / f"latency-{checkpoint_version}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    with _alone(path.with_suffix(".lock"), is_stopping):
        measurement = None if fresh else _read(path, conditions, cells)
        if measurement is None:
            measurement = measure(run, image_side, subnetworks, batch_sizes, budget_s=budget_s, clock=clock)
            _write(path, conditions, measurement)
    return measurement


@contextmanager
def _alone(lock: Path, is_stopping: Callable[[], bool]) -> Iterator[None]:
    """Let one process measure and the others wait: each would find the machine as slow as the others make it."""
    with ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(lock).acquire(cancel_check=is_stopping))
        except Timeout:
            logger.info("stopped while another process measured")
        except OSError as error:
            logger.warning("others may measure at the same time: %s", error)
        yield


class _Row(BaseModel):
    patch_grid: int
    keep_rate: float
    batch_size: int
    median_ms: PositiveFloat
    spread: NonNegativeFloat


class _File(BaseModel):
    conditions: dict[str, str | int]
    measured_at: AwareDatetime
    rows: list[_Row]


def _read(path: Path, conditions: dict[str, str | int], cells: Sequence[Cell]) -> Measurement | None:
    try:
        file = _File.model_validate_json(path.read_bytes())
        rows = {(SubNetwork(row.patch_grid, row.keep_rate), row.batch_size): row for row in file.rows}
        if file.conditions != conditions or rows.keys() != set(cells):
            raise ValueError("it was measured under other conditions")
        return _measurement(
            {cell: rows[cell].median_ms / 1e3 for cell in cells},
            {cell: rows[cell].spread for cell in cells},
            file.measured_at,
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s: cannot be used, measuring anew: %s", path, str(error).splitlines()[0])
        return None


def _write(path: Path, conditions: dict[str, str | int], measurement: Measurement) -> None:
    """Write the file for people too: a line for each row."""
    rows = [
        _Row(
            patch_grid=subnetwork.patch_grid,
            keep_rate=subnetwork.keep_rate,
            batch_size=batch_size,
            median_ms=round(1e3 * seconds, 4),
            spread=round(spread, 4),
        ).model_dump_json()
        for subnetwork, figures in measurement.table.seconds.items()
        for batch_size, seconds, spread in zip(
            measurement.table.batch_sizes, figures, measurement.spread[subnetwork], strict=True
        )
    ]
    head = json.dumps({"conditions": conditions, "measured_at": measurement.measured_at}, indent=2)
    text = head.removesuffix("\n}") + ',\n  "rows": [\n    ' + ",\n    ".join(rows) + "\n  ]\n}\n"
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # of another process, it would be half another's
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        logger.warning("the latencies cannot be kept: %s", error)


def _measurement(seconds: Mapping[Cell, float], spread: Mapping[Cell, float], measured_at: datetime) -> Measurement:
    subnetworks = dict.fromkeys(subnetwork for subnetwork, _ in seconds)
    batch_sizes = tuple(dict.fromkeys(batch_size for _, batch_size in seconds))

    def by_subnetwork(figures: Mapping[Cell, float]) -> dict[SubNetwork, tuple[float, ...]]:
        return {subnetwork: tuple(figures[subnetwork, size] for size in batch_sizes) for subnetwork in subnetworks}

    table = LatencyTable(batch_sizes, by_subnetwork(seconds))
    return Measurement(table, by_subnetwork(spread), measured_at.isoformat(timespec="seconds"))


def _cells(subnetworks: Sequence[SubNetwork], batch_sizes: Sequence[int]) -> list[Cell]:
    return [(subnetwork, batch_size) for subnetwork in subnetworks for batch_size in batch_sizes]


def _num_cpus() -> int:
    """Count the CPUs that this process may run on, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
