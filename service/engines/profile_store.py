"""Reads the latencies of this machine that were kept, and has measured what a start needs of those that were not."""

import logging
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from models.checkpoint import Checkpoint
from models.latency import LatencyTable
from models.latency_estimate import Cell
from models.profiles import ProfileTable
from models.subnetwork import SubNetwork
from service.engines.base import Engine, Prepare, Run
from service.engines.growing_profile import GrowingProfile, first_cells
from service.engines.profile_files import ProfileFile
from service.engines.profiler import (
    BUDGET_S,
    Figures,
    Measurement,
    cells_of,
    measure,
    measurement_of,
    stopwatch,
)

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # and the largest, whatever that is
# A machine that others load may be this much slower now than when it was measured, and is as fast again in a moment.
IMPLAUSIBLE_FACTOR = 10.0
IMPLAUSIBLE_GAIN = 3.0  # of more images in a batch; what is under it may be a disturbance of the smaller one
PROBES = 3
FIRST_S = 2.0  # for what is measured before the first request


def extended_profile(checkpoint: Checkpoint) -> ProfileTable:
    """Return the profile of a checkpoint with keep rates between those that it was trained at."""
    return checkpoint.profile.with_rates_between(checkpoint.config)


def nominal_latencies(profiles: ProfileTable) -> LatencyTable:
    """Pretend that a GFLOP takes a millisecond: for where nothing queues and nothing need be measured."""
    return LatencyTable((1,), {row.subnetwork: (row.gflops / 1000,) for row in profiles.rows})


def begin_profile(
    checkpoint: Checkpoint,
    engine: str,
    run: Run,
    *,
    folder: Path,
    max_batch_size: int,
    is_padded: bool = False,
    is_stopping: Callable[[], bool] = lambda: False,
    budget_s: float = FIRST_S,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[GrowingProfile, ProfileFile]:
    """Read what is known of this machine's latencies from a folder, and measure the little that a start needs.

    Args:
        checkpoint: whose.
        engine: its description of itself.
        run: the engine's.
        folder: where the figures are kept.
        max_batch_size: largest batch to be measured.
        is_padded: as of a LatencyTable.
        is_stopping: whether to wait no longer for another process that measures; `run` may then refuse to run.
        budget_s: time after which no further batch begins, once two sub-networks are known.
        clock: monotonic, in seconds.

    Returns:
        The profile, which grows, and where it is kept.
    """
    profiles, batch_sizes = extended_profile(checkpoint), measured_batch_sizes(max_batch_size)
    time_once = stopwatch(run, checkpoint.config.image_side, max_batch_size, clock)
    file = ProfileFile(folder, checkpoint.version, engine, cells_of(list(profiles.by_subnetwork), batch_sizes))
    with file.alone(is_stopping):
        profile = GrowingProfile(profiles, batch_sizes, _plausible(file, time_once), is_padded=is_padded)
        if profile.measured_share == 0:
            _measure_first(profile, first_cells(profiles, batch_sizes), time_once, budget_s, clock)
            if profile.figures.seconds:
                file.write(profile.figures)
    return profile, file


def inherited_profile(
    checkpoint: Checkpoint,
    engine: str,
    kept: Figures,
    *,
    folder: Path,
    max_batch_size: int,
    is_padded: bool = False,
) -> tuple[GrowingProfile, ProfileFile]:
    """Take over what was measured of a checkpoint of the same architecture on the same engine.

    Latency depends on shapes; other weights change none of it. Arguments and result as of `begin_profile`, but for the
    figures of the other one, `kept`.
    """
    profiles, batch_sizes = extended_profile(checkpoint), measured_batch_sizes(max_batch_size)
    cells = cells_of(list(profiles.by_subnetwork), batch_sizes)
    known = [cell for cell in cells if cell in kept.seconds]
    figures = Figures(
        {cell: kept.seconds[cell] for cell in known}, {cell: kept.spread[cell] for cell in known}, kept.measured_at
    )
    profile = GrowingProfile(profiles, batch_sizes, figures, is_padded=is_padded)
    return profile, ProfileFile(folder, checkpoint.version, engine, cells)


def _measure_first(
    profile: GrowingProfile,
    cells: Sequence[Cell],
    time_once: Callable[[Cell], float],
    budget_s: float,
    clock: Callable[[], float],
) -> None:
    """Measure cells in turn, those that are expected to take too long left out."""
    ends_at = clock() + budget_s
    for number, cell in enumerate(cells):
        while profile.seconds(cell) is None:
            if number >= 2 and clock() + profile.expected_s(cell) > ends_at:
                break
            profile.record(cell, time_once(cell))


def measure_latencies(
    checkpoint: Checkpoint,
    engine: Engine,
    *,
    folder: Path,
    max_batch_size: int,
    fresh: bool = False,
    budget_s: float = BUDGET_S,
) -> Measurement:
    """Read this machine's latencies of every sub-network of a checkpoint from a folder, or else measure them all.

    Args:
        checkpoint: whose.
        engine: runs it.
        folder: where the figures are kept.
        max_batch_size: largest batch to measure.
        fresh: measure even if there are figures.
        budget_s: time after which no further round begins.
    """
    return load_or_measure(
        folder,
        engine.run,
        image_side=checkpoint.config.image_side,
        subnetworks=tuple(extended_profile(checkpoint).by_subnetwork),
        batch_sizes=measured_batch_sizes(max_batch_size),
        checkpoint_version=checkpoint.version,
        engine=engine.describe(),
        prepare=engine.prepare,
        is_padded=engine.pads_batches,
        fresh=fresh,
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
    prepare: Prepare = lambda *_: None,
    is_padded: bool = False,
    fresh: bool = False,
    is_stopping: Callable[[], bool] = lambda: False,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
    cpus: int | None = None,
) -> Measurement:
    """Read the latencies that were measured before under the same conditions, or else measure and keep them.

    A kept file that cannot be used, that is a part only or that the machine contradicts is measured anew, and a folder
    that cannot be written to is lived with; the log says so.

    Args:
        folder: where the files are kept, one for each set of conditions; made if there is none.
        run: an engine's.
        image_side: S, of the images that it takes, in pixels.
        subnetworks: what to time.
        batch_sizes: ascending from 1.
        checkpoint_version: of the weights.
        engine: its description of itself: library, device, precision, threads.
        prepare: the engine's.
        is_padded: as of a LatencyTable.
        fresh: measure even if there is a file.
        is_stopping: whether to wait no longer for another process that measures; `run` may then refuse to run.
        budget_s: time after which no further round begins.
        clock: monotonic, in seconds.
        cpus: how many this process may run on; counted by default.
    """
    cells = cells_of(subnetworks, batch_sizes)
    file = ProfileFile(folder, checkpoint_version, engine, cells, cpus)
    with file.alone(is_stopping):
        kept = None if fresh else _plausible(file, stopwatch(run, image_side, 1, clock))
        if kept is not None and len(kept.seconds) == len(cells):
            return measurement_of(kept, is_padded=is_padded)
        figures = measure(run, image_side, subnetworks, batch_sizes, prepare=prepare, budget_s=budget_s, clock=clock)
        file.write(figures)
    return measurement_of(figures, is_padded=is_padded)


def measured_batch_sizes(largest: int) -> tuple[int, ...]:
    """List the sizes that are measured, of batches of up to so many."""
    return (*(size for size in BATCH_SIZES if size < largest), largest)


def _plausible(file: ProfileFile, time_once: Callable[[Cell], float]) -> Figures | None:
    """Read what is kept, unless the machine contradicts it."""
    kept = file.read()
    if kept is None or not (problem := _contradiction(kept, time_once)):
        return kept
    logger.warning("%s: cannot be used, measuring anew: %s", file.path, problem)
    return None


def _contradiction(kept: Figures, time_once: Callable[[Cell], float]) -> str | None:
    """Tell what is implausible about kept latencies, in themselves or beside a few runs of the slowest sub-network."""
    rows: dict[SubNetwork, list[float]] = {}
    for (subnetwork, _), seconds in kept.seconds.items():  # batch sizes ascend
        rows.setdefault(subnetwork, []).append(seconds)
    if any(IMPLAUSIBLE_GAIN * larger < smaller for row in rows.values() for smaller, larger in pairwise(row)):
        return "a larger batch is said to take less than a third of the time of a smaller one"
    alone = {cell: seconds for cell, seconds in kept.seconds.items() if cell[1] == 1}
    if not alone:
        return None
    slowest = max(alone, key=alone.__getitem__)
    kept_s, now_s = alone[slowest], min(time_once(slowest) for _ in range(PROBES))
    if not 1 / IMPLAUSIBLE_FACTOR < kept_s / now_s < IMPLAUSIBLE_FACTOR:
        return f"it says {1e3 * kept_s:.4g} ms where it takes {1e3 * now_s:.4g} ms now"
    return None
