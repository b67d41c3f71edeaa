"""`supervit profile`: prints the latency of each sub-network on this machine."""

import statistics
import sys
from collections.abc import Sequence

from tqdm import tqdm

from models.checkpoint import Checkpoint, load_checkpoint
from models.latency_estimate import Cell
from service.assembly import engine_choice
from service.commands.options import Profile
from service.engines.factory import open_engine
from service.engines.profile_store import measure_latencies
from service.engines.profiler import Measurement
from service.machine.monitor import Monitor
from service.settings import Settings, read_settings

NOISY_SPREAD = 0.1  # on a quiet machine the median spread is 1 to 3 %


def profile(command: Profile) -> None:
    """Print the latencies of this machine, measured now or before, and plot them if a file is named."""
    if command.plot_file:
        from models.evaluation.plots import (
            plot_latency,  # matplotlib comes with an extra only; fail before measuring
        )
    given = command.model_dump(exclude={"fresh", "plot_file"}, exclude_none=True)
    settings = read_settings(**given)
    measurement, _ = measure(settings, load_checkpoint(settings.checkpoint), fresh=command.fresh)
    print(_latency_table(measurement))
    if command.plot_file:
        plot_latency(measurement.table, command.plot_file)
        print(f"plotted in {command.plot_file}")


def _latency_table(measurement: Measurement) -> str:
    table = measurement.table
    head = f"{'ms per batch of':28s}" + "".join(f"{size:9d}" for size in table.batch_sizes)
    rows = [
        f"{subnetwork!s:28s}" + "".join(f"{1000 * seconds:9.2f}" for seconds in table.seconds[subnetwork])
        for subnetwork in sorted(table.seconds)
    ]
    return "\n".join([head, *rows, f"measured {measurement.measured_at}, median spread {_spread(measurement):.1%}"])


def _spread(measurement: Measurement) -> float:
    return statistics.median(share for shares in measurement.spread.values() for share in shares)


def measure(settings: Settings, checkpoint: Checkpoint, *, fresh: bool = False) -> tuple[Measurement, Checkpoint]:
    """Return the latencies, and the checkpoint with the profile of the precision that was measured.

    A progress bar and a line on stderr say where that takes a while, and where the latencies are of little use.
    """
    engine, served = open_engine(checkpoint, engine_choice(settings, checkpoint, Monitor().latest.cores))
    folder, most = settings.profile_folder, settings.max_batch_size
    measured = measure_latencies(served, engine, folder=folder, max_batch_size=most, fresh=fresh, track=_show_progress)
    warn_if_noisy(measured)
    return measured, served


def warn_if_noisy(measurement: Measurement) -> None:
    """Print a line on stderr where the latencies were measured on a busy machine, and so are of little use."""
    if (spread := _spread(measurement)) > NOISY_SPREAD:
        what = f"the latencies differ by {spread:.0%} from run to run; other processes probably kept the machine busy"
        print(f"supervit: {what}; `supervit profile --fresh` measures them again", file=sys.stderr)


def _show_progress(cells: Sequence[Cell]) -> "tqdm[Cell]":
    what = "measuring the latencies of this machine, round by round"
    return tqdm(cells, what, unit=" batches", leave=False, mininterval=1)
