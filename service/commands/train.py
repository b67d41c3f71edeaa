"""`supervit train`: runs a training, and prints the next step."""

from models.processes import own_rank
from models.training.recipe import Recipe
from models.training.state import TrainingError
from models.training.train import train as run_training
from service.errors import CommandError


def train(recipe: Recipe) -> None:
    """Train, or resume a training, and print where the checkpoint is.

    Raises:
        CommandError: the training cannot begin, or it fails.
        CheckpointError, DataError, DeviceError: a checkpoint, the data set or the device cannot be used.
    """
    try:
        path = run_training(recipe)
    except TrainingError as error:
        raise CommandError(str(error)) from error
    if own_rank() == 0:
        data = recipe.data if any((recipe.data / name).is_dir() for name in ("val", "test")) else "FOLDER_WITH_TEST"
        print(f"{path}: measure it with `supervit evaluate {path} {data}`")
