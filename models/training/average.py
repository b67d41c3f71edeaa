"""Average the weights of two SuperViTs, one of which was trained further from the other.

    python -m models.training.average A B --output C

Weights between the two are often more accurate than either (Wortsman et al., "Robust fine-tuning of zero-shot models",
CVPR 2022). Find the best share on held-out images, with `supervit evaluate`.
"""

from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, Field
from pydantic_settings import CliApp, CliPositionalArg
from torch import Tensor

from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.files.checkpoint_errors import CheckpointMismatchError
from models.header import Header
from models.profiles import ProfileTable


class Average(BaseModel):
    """Average the weights of two checkpoints of one architecture and the same classes."""

    first: CliPositionalArg[Path] = Field(description="SuperViT checkpoint")
    second: CliPositionalArg[Path] = Field(
        description="another that was trained on from it, perhaps at some of its patch grids and keep rates only"
    )
    output: Path = Field(description=".safetensors file for the result, whose accuracy is yet to be measured")
    share: float = Field(0.5, ge=0, le=1, description="of the second")


def average(options: Average) -> None:
    """Write the average, named after its file, with the sub-networks of the first checkpoint.

    Raises:
        CheckpointError: a checkpoint cannot be read, or the two differ in architecture, classes or patch grids.
        OSError: `output` cannot be written.
    """
    first, second = load_checkpoint(options.first), load_checkpoint(options.second)
    family = replace(second.config, patch_grids=first.config.patch_grids, keep_rates=first.config.keep_rates)
    if (first.config, first.class_names) != (family, second.class_names) or not (
        set(second.config.patch_grids) <= set(first.config.patch_grids)
    ):
        raise CheckpointMismatchError(
            f"{options.second}: differs in architecture, classes or patch grids from {options.first}"
        )
    others = _weights_by_name(second, first.config.patch_grids)
    for name, weight in first.model.state_dict().items():
        # Not averaged: a batch norm's count of batches, and the position embeddings of grids that the second lacks.
        if weight.is_floating_point() and name in others:
            weight.lerp_(others[name], options.share)
    profile = ProfileTable.unmeasured(first.config)
    header = Header(options.output.stem, first.config, first.class_names, profile)
    save_checkpoint(options.output, first.model, header)


def _weights_by_name(checkpoint: Checkpoint, patch_grids: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under their names in a model with more patch grids."""
    renamed = {
        f"pos_embed_list.{index}": f"pos_embed_list.{patch_grids.index(grid)}"
        for index, grid in enumerate(checkpoint.config.patch_grids)
    }
    return {renamed.get(name, name): weight for name, weight in checkpoint.model.state_dict().items()}


if __name__ == "__main__":
    average(CliApp.run(Average))
