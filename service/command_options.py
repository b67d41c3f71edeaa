"""What the commands that need the training's libraries are told, and where they write; the libraries come later."""

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_settings import CliPositionalArg

from models.data.datasets import MAX_BAD_IMAGES
from models.files.sources import bare_name
from models.processes import count_cores, default_workers
from service.errors import CommandError


class Evaluate(BaseModel):
    """Measure top-1 and top-5 of every sub-network and write them into the checkpoint's profile."""

    checkpoint: CliPositionalArg[str] = Field(
        description="SuperViT checkpoint: a path, the name of one that ships, or hf-hub:owner/name[@revision]"
    )
    data: CliPositionalArg[Path] = Field(
        description="folder with val/ to calibrate on and test/ to measure on, or only one of them, of class folders"
    )
    batch_size: int = Field(100, ge=1, description="images per batch")
    max_bad_images: float = Field(
        MAX_BAD_IMAGES, ge=0, lt=1, description="part of the images that may be unreadable; they are passed over"
    )
    workers: int = Field(
        default_factory=default_workers, ge=0, description="processes that decode images; by default one for each core"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, or auto")
    rates_between: bool = Field(False, description="also measure keep rates in steps of 0.05 between the trained ones")
    half: bool = Field(False, description="round the weights to half precision first, for half of the file's size")


class Profile(BaseModel):
    """Measure how long each sub-network takes on this machine, or show what was measured before."""

    checkpoint: str | None = Field(None, description="SuperViT checkpoint; by default the one that `serve` would take")
    engine: Literal["auto", "torch", "openvino"] | None = Field(None, description="what runs the model")
    device: str | None = Field(None, description="cpu, cuda, cuda:1, or auto")
    precision: Literal["auto", "float32", "bfloat16", "int8"] | None = Field(None, description="of the products")
    threads: int | None = Field(None, ge=1, description="threads of the engine on a CPU; by default those of `serve`")
    max_batch_size: int | None = Field(None, ge=1, le=64, description="largest batch to measure")
    fresh: bool = Field(False, description="measure even where there is a measurement")
    plot_file: Path | None = Field(None, description="PNG file for the picture of it")


class Quantize(BaseModel):
    """Prepare a checkpoint for CPUs that are fastest in 8 bits: calibrate on val/, measure on test/."""

    checkpoint: CliPositionalArg[str] = Field(
        description="SuperViT checkpoint: a path, the name of one that ships, or hf-hub:owner/name[@revision]"
    )
    data: CliPositionalArg[Path] = Field(
        description="folder with val/ to calibrate on and test/ to measure on, or only one of them, of class folders"
    )
    output: Path | None = Field(
        None, description="file to write; the checkpoint itself by default, or one of its name here if it ships"
    )
    batch_size: int = Field(16, ge=1, description="images per batch")
    max_bad_images: float = Field(
        MAX_BAD_IMAGES, ge=0, lt=1, description="part of the images that may be unreadable; they are passed over"
    )
    workers: int = Field(0, ge=0, description="processes that decode images beside the engine; by default none")
    threads: int = Field(default_factory=count_cores, ge=1, description="threads of the engine; by default every core")


def file_to_write(name: str, source: Path, *, output: Path | None = None, is_ours: bool = True) -> Path:
    """Choose the file for a checkpoint: neither the installed package nor a cache is ours to write to.

    Args:
        name: of the checkpoint, as it was given.
        source: where it was found.
        output: the file that was asked for.
        is_ours: whether the source is in our own format; another one is left as it is.

    Raises:
        CommandError: another file is there, or none can be written.
    """
    path = output or Path(name)
    if path != source and output is None:
        path = Path(f"{bare_name(name)}.safetensors")
    elif not is_ours or path.suffix != ".safetensors":
        path = path.with_name(f"{path.name}.safetensors")
    if path != source and path.exists():
        raise CommandError(f"{path}: would be overwritten")
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"{path.parent}: is not writable")
    return path
