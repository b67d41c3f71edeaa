"""Reads the stored latencies of this machine, and measures those that a start needs and that are missing."""

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
    Track,
    cells_of,
    measure,
    measurement_of,
    stopwatch,
)

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # as far as they are below the largest batch size, which is measured as well
# Under others' load a machine may be nearly this much slower than when it was measured, and recover in a moment.
IMPLAUSIBLE_FACTOR = 10.0
IMPLAUSIBLE_GAIN = 3.0  # speed-up of a larger batch over a smaller one; less may be a disturbance of the smaller one
PROBES = 3
FIRST_S = 2.0  # seconds for the measurements before the first request


def extended_profile(checkpoint: Checkpoint) -> ProfileTable:
    """Return the profile of a checkpoint, with further keep rates between the trained ones."""
    return checkpoint.profile.with_interpolated_rates(checkpoint.config)


def nominal_latencies(profiles: ProfileTable) -> LatencyTable:
    """Return a millisecond per GFLOP as latencies: for uses where nothing queues and nothing need be measured."""
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
    """Read this machine's latencies from a folder, as far as they are known, and measure the few that a start needs.

    Args:
        checkpoint: the checkpoint that is profiled.
        engine: the engine's description of itself.
        run: the engine's `run`.
        folder: where the figures are kept.
        max_batch_size: largest batch to measure.
        is_padded: as in LatencyTable.
        is_stopping: whether to stop waiting for another process that measures; `run` may then refuse to run.
        budget_s: once two sub-networks are measured, batches that are expected to end after this many seconds are
            skipped.
        clock: monotonic, in seconds.

    Returns:
        The profile, which grows, and the file where it is kept.
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
    """Take over the figures of another checkpoint of the same architecture on the same engine.

    Latency depends on shapes, not on weights. Arguments and result are those of `begin_profile`; `kept` has the figures
    of the other checkpoint.
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
    """Measure cells in turn, and leave out those that are expected to exceed the budget."""
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
    track: Track = iter,
) -> Measurement:
    """Read this machine's latencies of every sub-network of a checkpoint from a folder, and measure those missing.

    Args:
        checkpoint: the checkpoint that is profiled.
        engine: runs the checkpoint's model.
        folder: where the figures are kept.
        max_batch_size: largest batch to measure.
        fresh: whether to measure even if there are figures.
        budget_s: seconds after which no further round begins.
        track: as in `load_or_measure`.
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
        track=track,
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
    track: Track = iter,
    clock: Callable[[], float] = time.perf_counter,
    cpus: int | None = None,
) -> Measurement:
    """Read the latencies that were measured earlier under the same conditions; measure and store those missing.

    All are measured anew where the stored file cannot be used or is contradicted by the machine. A folder that cannot
    be written to is tolerated. The log warns of each.

    Args:
        folder: where the files are kept, one for each set of conditions; created if missing.
        run: an engine's `run`.
        image_side: S, in pixels, of the images that the engine takes.
        subnetworks: the sub-networks to time.
        batch_sizes: ascending from 1.
        checkpoint_version: version of the weights.
        engine: the engine's description of itself: library, device, precision, threads.
        prepare: the engine's `prepare`.
        is_padded: as in LatencyTable.
        fresh: whether to measure even if there is a file.
        is_stopping: whether to stop waiting for another process that measures; `run` may then refuse to run.
        budget_s: seconds after which no further round begins.
        track: passes on the cells of each round of measuring in turn, and may show how far the round is.
        clock: monotonic, in seconds.
        cpus: number of CPUs that this process may run on; counted by default.
    """
    cells = cells_of(subnetworks, batch_sizes)
    file = ProfileFile(folder, checkpoint_version, engine, cells, cpus)
    with file.alone(is_stopping):
        kept = None if fresh else _plausible(file, stopwatch(run, image_side, 1, clock))
        missing = [cell for cell in cells if kept is None or cell not in kept.seconds]
        if kept is None or missing:
            found = measure(run, image_side, missing, prepare=prepare, budget_s=budget_s, track=track, clock=clock)
            kept = found if kept is None else _joined(cells, kept, found)
            file.write(kept)
    return measurement_of(kept, is_padded=is_padded)


def _joined(cells: Sequence[Cell], kept: Figures, found: Figures) -> Figures:
    """Return both figures as one, in the order of the cells; they are as old as the older ones."""
    seconds, spread = {**kept.seconds, **found.seconds}, {**kept.spread, **found.spread}
    return Figures({cell: seconds[cell] for cell in cells}, {cell: spread[cell] for cell in cells}, kept.measured_at)


def measured_batch_sizes(largest: int) -> tuple[int, ...]:
    """Return the batch sizes to measure, up to and including the largest."""
    return (*(size for size in BATCH_SIZES if size < largest), largest)


def _plausible(file: ProfileFile, time_once: Callable[[Cell], float]) -> Figures | None:
    """Read the stored figures; return None where there are none or the machine contradicts them."""
    kept = file.read()
    if kept is None or not (problem := _contradiction(kept, time_once)):
        return kept
    logger.warning("%s: cannot be used, measuring again: %s", file.path, problem)
    return None


def _contradiction(kept: Figures, time_once: Callable[[Cell], float]) -> str | None:
    """Return why stored latencies are implausible, by themselves or against a few runs of the slowest sub-network."""
    rows: dict[SubNetwork, list[float]] = {}
    for (subnetwork, _), seconds in kept.seconds.items():  # batch sizes ascend
        rows.setdefault(subnetwork, []).append(seconds)
    if any(IMPLAUSIBLE_GAIN * larger < smaller for row in rows.values() for smaller, larger in pairwise(row)):
        return "the stored latency of a larger batch is less than a third of that of a smaller one"
    alone = {cell: seconds for cell, seconds in kept.seconds.items() if cell[1] == 1}
    if not alone:
        return None
    slowest = max(alone, key=alone.__getitem__)
    kept_s, now_s = alone[slowest], min(time_once(slowest) for _ in range(PROBES))
    if not 1 / IMPLAUSIBLE_FACTOR < kept_s / now_s < IMPLAUSIBLE_FACTOR:
        return f"the stored latency is {1e3 * kept_s:.4g} ms, but it is {1e3 * now_s:.4g} ms now"
    return None
