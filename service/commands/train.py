"""`supervit train`: a run of the training, and what is to be done next."""

from models.training.recipe import Recipe
from models.training.state import TrainingError
from models.training.train import train as run_training
from service.errors import CommandError


def train(recipe: Recipe) -> None:
    """Train, or go on with a training, and say where the checkpoint is.

    Raises:
        CommandError: the run cannot begin, or it fails.
        CheckpointError, DataError, DeviceError: what it begins with is unusable.
    """
    try:
        path = run_training(recipe)
    except TrainingError as error:
        raise CommandError(str(error)) from error
    print(f"{path}: measure it with `supervit evaluate {path} {recipe.data}`")
