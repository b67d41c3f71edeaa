"""What a training run keeps in its folder: the state to resume from, the checkpoint, the log and its plot."""

import io
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from timm.utils import ModelEmaV3

from models.checkpoint import save_checkpoint
from models.data.datasets import is_unicode
from models.evaluation.plots import plot_training
from models.files.atomic import write_atomically
from models.files.checkpoint_errors import printable_text
from models.files.pickles import UNPICKLING_ERRORS
from models.header import Header
from models.profiles import ProfileTable
from models.supervit import SuperViT
from models.training.recipe import Recipe

CHECKPOINT_NAME, STATE_NAME, LOG_NAME, PLOT_NAME = "checkpoint.safetensors", "state.pt", "log.jsonl", "training.png"
LOCK_NAME = ".lock"

# Options that a resumed run may change. Changing any other would silently make it a run that no recipe describes.
MAY_CHANGE = frozenset(
    [
        "data",
        "output",
        "resume",
        "epochs",
        "single_epochs",
        "learning_rate",
        "warmup_epochs",
        "precision",
        "compile",
        "max_bad_images",
        "workers",
        "device",
    ]
)


class TrainingError(Exception):
    """A run cannot start or continue; the message says what to do."""


@dataclass(frozen=True, slots=True)
class State:
    """Everything that changes during training; apart from the description of the run, nothing else is saved."""

    model: SuperViT
    average: ModelEmaV3
    optimizer: torch.optim.Optimizer
    processes: int
    scaler: torch.amp.GradScaler | None = None  # in float16 only

    @property
    def is_finite(self) -> bool:
        """Whether every weight, trained or averaged, is finite."""
        weights = (*self.model.state_dict().values(), *self.average.state_dict().values())
        return all(bool(tensor.isfinite().all()) for tensor in weights)

    def save(
        self, recipe: Recipe, class_names: tuple[str, ...], record: dict[str, Any], watched: str | None = None
    ) -> None:
        """Write the state after an epoch, with the epoch's record; a crash midway leaves the previous state intact.

        Args:
            recipe: the recipe of the run; the file goes to its output folder.
            class_names: one per logit.
            record: the epoch's line of the log, still without the accuracy of the averaged weights.
            watched: digest of the images that are not trained on.
        """
        path = recipe.output / STATE_NAME
        content = {
            "recipe": recipe.model_dump(mode="json"),
            "class_names": list(class_names),
            "epoch": record["epoch"],
            "record": record,
            "watched": watched,
            "processes": self.processes,
            "model": self.model.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler and self.scaler.state_dict(),
        }
        save_atomically(content, path)

    def load(self, recipe: Recipe, class_names: tuple[str, ...]) -> tuple[dict[str, Any], str | None]:
        """Read what `save` wrote; return the record of the last epoch and the digest of the images not trained on.

        From an older version, the record is only the number of the epoch, and there is no digest.

        Raises:
            TrainingError: there is no state, it is damaged, or it was made with other options, classes or processes.
        """
        path = recipe.output / STATE_NAME
        if not has_state(recipe.output):
            raise TrainingError(f"{path}: nothing to resume")
        try:
            with path.open("rb") as file:
                # To the CPU, where AdamW counts its steps; weights and moments are copied to the model's device.
                content = torch.load(file, map_location="cpu", weights_only=True)
            default = Recipe(data=recipe.data, output=recipe.output).model_dump(mode="json")
            differences = [
                # Options that an older version lacked had today's defaults, but no older run exchanged tokens.
                *_other_options(default | {"mix_token": False} | content["recipe"], recipe.model_dump(mode="json")),
                *_other_classes(content["class_names"], class_names),
            ]
            if content["processes"] != self.processes:  # another number would change the images in a step
                differences.append(f"{content['processes']} torchrun processes, not {self.processes}")
            if differences:
                raise TrainingError(f"{path}: was made with {'; '.join(differences)}")
            self.model.load_state_dict(content["model"])
            self.average.module.load_state_dict(content["average"])
            self.optimizer.load_state_dict(content["optimizer"])
            if self.scaler and content.get("scaler"):
                self.scaler.load_state_dict(content["scaler"])
            record: dict[str, Any] = content.get("record", {"epoch": int(content["epoch"])})
            return record, content.get("watched")
        except (OSError, *UNPICKLING_ERRORS) as error:
            lacking = f": {printable_text(error)}" if isinstance(error, KeyError) else ""
            raise TrainingError(f"{path}: damaged or from another version{lacking}") from error


def _other_options(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in now | then:
        if name not in MAY_CHANGE and then[name] != now[name]:
            yield f"--{name.replace('_', '-')} {_as_typed(then[name])}, not {_as_typed(now[name])}"


def _as_typed(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "unset" if value is None else str(value) or '""'


def _other_classes(then: list[str], now: tuple[str, ...]) -> Iterator[str]:
    """Describe only the first pair that differs; a thousand would fill the screen."""
    pairs = itertools.zip_longest(then, now, fillvalue="none")
    yield from itertools.islice((f"class folder {old}, not {new}" for old, new in pairs if old != new), 1)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def has_state(output: Path) -> bool:
    """Return whether the folder holds a run; False for a folder that cannot be read."""
    return os.path.isfile(output / STATE_NAME)  # noqa: PTH113 - Path.is_file raises if a folder may not be entered


def version_of_state(output: Path) -> tuple[int, int] | None:
    """Return what changes with every saved state of a run; None where there is none."""
    try:
        status = (output / STATE_NAME).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def save_atomically(content: object, path: Path) -> None:
    """Write a file that `torch.load` reads; a crash midway leaves the previous file at `path`.

    Raises:
        OSError: the file cannot be written, as on a full disk; torch.save would say less about the cause.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def prepare_folder(output: Path) -> None:
    """Create the run's folder and check that files can be written there, before an epoch is spent.

    Raises:
        TrainingError: the folder cannot be written to, or the checkpoint cannot be named after it.
    """
    if not is_unicode(output.resolve().name):
        raise TrainingError(f"{str(output)!r}: the name must be UTF-8; the checkpoint is named after the folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise TrainingError(f"{output}: not writable: {error.strerror}") from error


@contextmanager
def alone_in(output: Path, found: tuple[int, int] | None) -> Iterator[None]:
    """Keep other runs out of a run's folder until the block ends, where the file system has locks.

    Args:
        output: the folder.
        found: what `version_of_state` returned before the run was set up, which takes minutes.

    Raises:
        TrainingError: another process trains there, or has trained there meanwhile.
    """
    lock = FileLock(output / LOCK_NAME)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise TrainingError(f"{output}: another process is training in this folder") from None
    except (OSError, NotImplementedError):  # what filelock raises on a file system without locks
        pass
    try:
        if version_of_state(output) != found:
            raise TrainingError(f"{output}: another process has trained in this folder meanwhile")
        yield
    finally:
        lock.release()


def read_log(output: Path, epochs: int) -> list[dict[str, Any]]:
    """Read the log of the first `epochs` epochs; any later lines belong to a state that was never saved.

    Raises:
        TrainingError: the log is damaged.
    """
    path = output / LOG_NAME
    if not path.exists():
        return []
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        records = [record for record in records if record["epoch"] <= epochs]
        if len({tuple(record["top1"].keys()) for record in records}) > 1:
            raise ValueError("its lines have different sub-networks")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path}: damaged: {_first_line(error)}; repair it, or move it away and resume") from error
    return records


def recovery_advice(output: Path, epoch: int) -> str:
    """Say how to continue after `epoch` produced values that are not finite."""
    start = f"the state before this epoch is kept in {output}: resume" if epoch > 1 else "start again"
    return f"{start} with a lower --learning-rate or --precision float32"


def save_weights(recipe: Recipe, state: State, class_names: tuple[str, ...]) -> None:
    """Save the averaged weights as a checkpoint without measured accuracies, named after the run's folder."""
    config = state.model.config
    header = Header(recipe.output.resolve().name, config, class_names, ProfileTable.unmeasured(config))
    save_checkpoint(recipe.output / CHECKPOINT_NAME, state.average.module, header)


def save_log(output: Path, records: list[dict[str, Any]]) -> None:
    """Write the whole log, one line per epoch, and plot it."""
    write_atomically(output / LOG_NAME, "".join(json.dumps(record) + "\n" for record in records).encode())
    plot_training(records, output / PLOT_NAME)
