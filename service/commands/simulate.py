"""`supervit simulate`: what would become of traffic on this machine."""

from models.checkpoint import load_checkpoint
from service.commands.profile import measure
from service.engines.profile_store import extended_profile
from service.settings import read_settings
from service.simulation.report import Simulate
from service.simulation.report import simulate as replay


def simulate(command: Simulate) -> None:
    """Print what would become of traffic on this machine."""
    if command.plot_file:
        import models.evaluation.plots  # noqa: F401 - comes with an extra only; known before anything is measured
    settings = read_settings(**command.model_dump(include={"checkpoint", "max_batch_size"}, exclude_none=True))
    checkpoint = load_checkpoint(settings.checkpoint)
    measurement, served = measure(settings, checkpoint)
    print(replay(command, extended_profile(served), measurement.table))
