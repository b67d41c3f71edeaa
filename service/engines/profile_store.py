"""Keeps the latencies of this machine from one start to the next, and has them measured where there are none."""

import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from pydantic import AwareDatetime, BaseModel, Field, NonNegativeFloat, PositiveFloat

from models.checkpoint import Checkpoint
from models.files.atomic import write_atomically
from models.latency import LatencyTable
from models.profiles import ProfileTable
from models.subnetwork import SubNetwork
from service.engines.base import Run
from service.engines.profiler import BUDGET_S, Cell, Measurement, cells_of, measure, measurement_of

logger = logging.getLogger(__name__)

FORMAT = 1
BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # and the largest, whatever that is
MAX_FILE_BYTES = 2**20  # of some hundred rows, 10 kB
# A machine that others load may be this much slower now than when it was measured, and is as fast again in a moment.
IMPLAUSIBLE_FACTOR = 10.0
IMPLAUSIBLE_GAIN = 3.0  # of more images in a batch; what is under it may be a disturbance of the smaller one
PROBES = 3


def extended_profile(checkpoint: Checkpoint) -> ProfileTable:
    """Return the profile of a checkpoint with keep rates between those that it was trained at."""
    return checkpoint.profile.with_rates_between(checkpoint.config)


def nominal_latencies(profiles: ProfileTable) -> LatencyTable:
    """Pretend that every batch takes a millisecond: for where nothing queues and nothing need be measured."""
    return LatencyTable((1,), dict.fromkeys(profiles.by_subnetwork, (0.001,)))


def measure_latencies(
    checkpoint: Checkpoint,
    engine: str,
    run: Run,
    *,
    folder: Path,
    max_batch_size: int,
    fresh: bool = False,
    is_stopping: Callable[[], bool] = lambda: False,
    budget_s: float = BUDGET_S,
) -> Measurement:
    """Read this machine's latencies of every sub-network of a checkpoint from a folder, or else measure them.

    Args:
        checkpoint: whose.
        engine: its description of itself.
        run: the engine's.
        folder: where the figures are kept.
        max_batch_size: largest batch to measure.
        fresh: measure even if there are figures.
        is_stopping: whether to wait no longer for another process that measures; `run` may then refuse to run.
        budget_s: time after which no further round begins.
    """
    return load_or_measure(
        folder,
        run,
        image_side=checkpoint.config.image_side,
        subnetworks=tuple(extended_profile(checkpoint).by_subnetwork),
        batch_sizes=(*(size for size in BATCH_SIZES if size < max_batch_size), max_batch_size),
        checkpoint_version=checkpoint.version,
        engine=engine,
        fresh=fresh,
        is_stopping=is_stopping,
        budget_s=budget_s,
    )


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
    cpus: int | None = None,
) -> Measurement:
    """Read the latencies that were measured before under the same conditions, or else measure and keep them.

    A kept file that cannot be used or that the machine contradicts is measured anew, and a folder that cannot be
    written to is lived with; the log says so.

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
        cpus: how many this process may run on; counted by default.
    """
    conditions: dict[str, str | int] = {
        "format": FORMAT,
        "checkpoint_version": checkpoint_version,
        "engine": engine,
        "cpus": _num_cpus() if cpus is None else cpus,
    }
    cells = cells_of(subnetworks, batch_sizes)
    key = json.dumps([conditions, [(*astuple(subnetwork), batch_size) for subnetwork, batch_size in cells]])
    path = folder / f"latency-{checkpoint_version}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    with _alone(path.with_suffix(".lock"), is_stopping):
        _warn_of_others(folder)
        measurement = None if fresh else _read(path, conditions, cells)
        if measurement is not None and (problem := _contradiction(measurement, run, image_side, clock)):
            logger.warning("%s: cannot be used, measuring anew: %s", path, problem)
            measurement = None
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


def _warn_of_others(folder: Path) -> None:
    """Say so where other users may write what this server believes."""
    with suppress(OSError):  # to write there will fail, too, and say why
        found = folder.stat()
        if found.st_mode & stat.S_IWOTH or found.st_uid not in (0, os.geteuid()):
            logger.warning("%s: other users may write there, and with that decide what this server expects", folder)


def _contradiction(measurement: Measurement, run: Run, image_side: int, clock: Callable[[], float]) -> str | None:
    """Tell what is implausible about kept latencies, in themselves or beside a few runs of the slowest sub-network."""
    seconds = measurement.table.seconds
    if any(
        IMPLAUSIBLE_GAIN * larger < smaller for figures in seconds.values() for smaller, larger in pairwise(figures)
    ):
        return "a larger batch is said to take less than a third of the time of a smaller one"
    slowest = max(seconds, key=lambda subnetwork: seconds[subnetwork][0])
    images = torch.zeros(1, 3, image_side, image_side, dtype=torch.uint8)
    took_s = []
    for _ in range(PROBES):
        started_at = clock()
        run(images, slowest)
        took_s.append(clock() - started_at)
    kept_s, now_s = seconds[slowest][0], min(took_s)
    if not 1 / IMPLAUSIBLE_FACTOR < kept_s / now_s < IMPLAUSIBLE_FACTOR:
        return f"it says {1e3 * kept_s:.4g} ms where it takes {1e3 * now_s:.4g} ms now"
    return None


class _Cell(BaseModel):
    patch_grid: int
    keep_rate: float
    batch_size: int
    median_ms: PositiveFloat = Field(allow_inf_nan=False)
    spread: NonNegativeFloat = Field(allow_inf_nan=False)


class _File(BaseModel):
    conditions: dict[str, str | int]
    measured_at: AwareDatetime
    rows: list[_Cell]


def _read(path: Path, conditions: dict[str, str | int], cells: Sequence[Cell]) -> Measurement | None:
    try:
        file = _File.model_validate_json(_read_regular(path))
        rows = {(SubNetwork(row.patch_grid, row.keep_rate), row.batch_size): row for row in file.rows}
        if file.conditions != conditions or rows.keys() != set(cells):
            raise ValueError("it was measured under other conditions")
        return measurement_of(
            {cell: rows[cell].median_ms / 1e3 for cell in cells},
            {cell: rows[cell].spread for cell in cells},
            file.measured_at,
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s: cannot be used, measuring anew: %s", path, str(error).splitlines()[0])
        return None


def _read_regular(path: Path) -> bytes:
    """Read a file that others may have put there: no link is followed, no pipe is waited for, no memory is filled.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, or too long.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor is no path
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no regular file")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it is longer than {MAX_FILE_BYTES} bytes")
    return content


def _write(path: Path, conditions: dict[str, str | int], measurement: Measurement) -> None:
    """Write the file for people too: a line for each row."""
    rows = [
        _Cell(
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        logger.warning("the latencies cannot be kept: %s", error)


def _num_cpus() -> int:
    """Count the CPUs that this process may run on, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
