"""Average the weights of two SuperViTs, of which one was trained on from the other: `python -m models.average A B`.

What lies between the two is often more accurate than either (Wortsman et al., "Robust fine-tuning of zero-shot models",
CVPR 2022). How far between is best is to be found on held-out images, with `supervit evaluate`.
"""

from pathlib import Path

from pydantic import BaseModel, Field
from pydantic_settings import CliApp, CliPositionalArg

from models.checkpoint import CheckpointMismatchError, Header, load_checkpoint, save_checkpoint
from models.profiles import ProfileTable


class Average(BaseModel):
    """Average the weights of two checkpoints of one architecture and the same classes."""

    first: CliPositionalArg[Path] = Field(description="SuperViT checkpoint")
    second: CliPositionalArg[Path] = Field(description="another that was trained on from it")
    output: Path = Field(description=".safetensors file for the result, whose accuracy is yet to be measured")
    share: float = Field(0.5, ge=0, le=1, description="of the second")


def average(options: Average) -> None:
    """Write the average, named after its file.

    Raises:
        CheckpointError: one of the two cannot be read, or they are of different kinds.
        OSError: `output` cannot be written.
    """
    first, second = load_checkpoint(options.first), load_checkpoint(options.second)
    if (first.config, first.class_names) != (second.config, second.class_names):
        raise CheckpointMismatchError(
            f"{options.second}: of another architecture or other classes than {options.first}"
        )
    others = second.model.state_dict()
    for name, weight in first.model.state_dict().items():
        if weight.is_floating_point():  # or it is a batch norm's count of batches
            weight.lerp_(others[name], options.share)
    profile = ProfileTable.unmeasured(first.config)
    header = Header(options.output.stem, first.config, first.class_names, profile)
    save_checkpoint(options.output, first.model, header)


if __name__ == "__main__":
    average(CliApp.run(Average))
