"""`supervit simulate`: replays traffic against the measured latencies of this machine."""

from models.checkpoint import load_checkpoint
from service.commands.profile import measure
from service.engines.profile_store import extended_profile
from service.settings import read_settings
from service.simulation.report import Simulate
from service.simulation.report import simulate as replay


def simulate(command: Simulate) -> None:
    """Print how this machine would serve the traffic."""
    if command.plot_file:
        import models.evaluation.plots  # noqa: F401 - matplotlib comes with an extra only; fail before measuring
    settings = read_settings(**command.model_dump(include={"checkpoint", "max_batch_size"}, exclude_none=True))
    checkpoint = load_checkpoint(settings.checkpoint)
    measurement, served = measure(settings, checkpoint)
    print(replay(command, extended_profile(served), measurement.table))
