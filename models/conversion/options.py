"""Options of `supervit convert`. Values only: the code that reads them imports timm, which takes seconds."""

from pathlib import Path

from pydantic import BaseModel, Field, PositiveInt
from pydantic_settings import CliPositionalArg

from models.subnetwork import Interpolation


class Convert(BaseModel):
    """Convert a plain ViT into a SuperViT, without training."""

    vit: CliPositionalArg[Path] = Field(
        description="weights of a plain ViT (.pth, .safetensors, .onnx), or the name of a timm model to download"
    )
    output: Path = Field(description=".safetensors file for the SuperViT")
    name: str | None = Field(
        None, description="timm name of the architecture in the file, e.g. vit_small_patch16_224.augreg_in1k"
    )
    num_heads: PositiveInt | None = Field(
        None, description="attention heads, if neither name nor width determines them"
    )
    patch_kernel: PositiveInt | None = Field(None, description="patch side in pixels instead of the ViT's")
    patch_grids: tuple[int, ...] | None = Field(
        None, description="patch grids; by default 8/14, 10/14, 12/14 and all of the ViT's own"
    )
    keep_rates: tuple[float, ...] | None = Field(None, description="keep rates; by default 0.5,0.7,1")
    prune_blocks: tuple[int, ...] | None = Field(None, description="blocks that prune; by default three, evenly spaced")
    mean: tuple[float, float, float] | None = Field(None, description="RGB mean in [0, 1], to normalise images")
    std: tuple[float, float, float] | None = Field(None, description="RGB standard deviation, likewise")
    interpolation: Interpolation | None = Field(None, description="filter for resizing images")
    crop_fraction: float | None = Field(
        None, description="side of the evaluation crop as a fraction of the resized shorter side"
    )
