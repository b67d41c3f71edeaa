"""`supervit simulate`: replays traffic against the measured latencies of this machine; prints, writes and plots it."""

import json

from models.checkpoint import load_checkpoint
from models.latency import LatencyTable
from models.profiles import ProfileTable
from service.commands.profile import measure
from service.engines.profile_store import extended_profile
from service.settings import read_settings
from service.simulation.options import Simulate
from service.simulation.report import sweep


def simulate(command: Simulate) -> None:
    """Print how this machine would serve the traffic."""
    if command.plot_file:
        import models.evaluation.plots  # noqa: F401 - matplotlib comes with an extra only; fail before measuring
    settings = read_settings(**command.model_dump(include={"checkpoint", "max_batch_size"}, exclude_none=True))
    checkpoint = load_checkpoint(settings.checkpoint)
    measurement, served = measure(settings, checkpoint)
    print(simulate_machines(command, extended_profile(served), measurement.table))


def simulate_machines(command: Simulate, profiles: ProfileTable, latencies: LatencyTable) -> str:
    """Simulate machines of these latencies, write the files that were asked for, and return the text to print.

    Raises:
        InvalidParameterError, BudgetTooSmallError: as in `sweep`.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: matplotlib, which draws the plot, is not installed.
    """
    for path in filter(None, (command.json_file, command.plot_file)):
        path.touch()  # fails now rather than after the simulation
    report = sweep(command, profiles, latencies)
    if command.json_file:
        options = command.model_dump(mode="json", exclude_none=True)
        command.json_file.write_text(json.dumps({"options": options, "runs": report.runs}, indent=2) + "\n")
    if command.plot_file:
        from models.evaluation.plots import plot_simulation

        plot_simulation(report.courses, command.plot_file)
    return report.text
