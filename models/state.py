"""What a training run keeps in its folder: the state to go on from, the checkpoint, the log and its picture."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3

from models.checkpoint import UNPICKLING_ERRORS, Header, save_checkpoint
from models.plots import plot_training
from models.profiles import ProfileTable
from models.supervit import SuperViT

CHECKPOINT_NAME, STATE_NAME, LOG_NAME, PLOT_NAME = "checkpoint.safetensors", "state.pt", "log.jsonl", "training.png"


class TrainingError(Exception):
    """A run cannot start or go on; the message says what to do."""


@dataclass(frozen=True, slots=True)
class State:
    """Everything that changes while training; what is saved after an epoch is exactly this."""

    model: SuperViT
    average: ModelEmaV3
    optimizer: torch.optim.Optimizer

    def save(self, path: Path, epoch: int) -> None:
        """Write the state after `epoch` epochs; a crash half-way leaves whatever stood at `path`."""
        partial = path.with_name(path.name + ".partial")
        content = {
            "epoch": epoch,
            "model": self.model.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(content, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> int:
        """Read what `save` wrote and return how many epochs it had behind it.

        Raises:
            TrainingError: there is none, it is damaged, or it belongs to another model.
        """
        if not path.is_file():
            raise TrainingError(f"{path}: nothing to resume")
        try:
            with path.open("rb") as file:
                content = torch.load(file, map_location=self.model.cls_token.device, weights_only=True)
        except UNPICKLING_ERRORS as error:
            raise TrainingError(f"{path}: damaged: {_first_line(error)}") from error
        try:
            self.model.load_state_dict(content["model"])
            self.average.module.load_state_dict(content["average"])
            self.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            raise TrainingError(f"{path}: belongs to another model: {_first_line(error)}") from error
        return int(content["epoch"])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def save_epoch(output: Path, state: State, class_names: tuple[str, ...], record: dict[str, Any]) -> None:
    """Save checkpoint and log, draw the log, and save the state last: it decides where a resumed run goes on.

    Args:
        output: the run's folder.
        state: of the run; the checkpoint gets the averaged weights.
        class_names: one per logit.
        record: the epoch's line of the log, its number under "epoch".
    """
    output.mkdir(parents=True, exist_ok=True)
    config = state.model.config
    header = Header(output.resolve().name, config, class_names, ProfileTable.unmeasured(config))
    save_checkpoint(output / CHECKPOINT_NAME, state.average.module, header)
    log = output / LOG_NAME
    past = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    records = [earlier for earlier in past if earlier["epoch"] < record["epoch"]] + [record]
    partial = log.with_name(LOG_NAME + ".partial")
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in records))
    partial.replace(log)
    plot_training(records, output / PLOT_NAME)
    state.save(output / STATE_NAME, record["epoch"])
