"""Option models of the commands whose options have no better place. Imports no slow library: help waits for it."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_settings import CliPositionalArg

from models.defaults import MAX_BAD_IMAGES, count_cores, default_workers
from service.domain import KEY_NAME

STDIN = Path("-")


def _named(photos: Any) -> Any:  # noqa: ANN401 - whatever was given
    if "" in photos:  # as from an unset shell variable; as a path, it would be the current folder
        raise ValueError("one of the names is empty")
    return photos


class Classify(BaseModel):
    """Classify photographs, in this process or by a running server; a few at a time, answered in their order."""

    photos: CliPositionalArg[Annotated[list[Path], BeforeValidator(_named)]] = Field(
        description="image files, folders of them, or - for an image from stdin", min_length=1
    )
    budget_gflops: float | None = Field(None, gt=0, description="most that each may cost, in 1e9 multiply-accumulates")
    budget_ms: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="time for each; of a server by default what it grants, else no end"
    )
    min_confidence: float | None = Field(
        None, ge=0, lt=1, description="probability of an answer under which the photo is looked at again"
    )
    patch_grid: int | None = Field(None, ge=1, description="a sub-network by name instead of a budget")
    keep_rate: float | None = Field(None, gt=0, le=1, description="with --patch-grid")
    url: str | None = Field(
        None, min_length=1, description="server to ask, e.g. http://127.0.0.1:8000; this process by default"
    )
    checkpoint: str | None = Field(
        None, description="SuperViT checkpoint to use in this process; by default the one that `serve` would take"
    )
    format: Literal["table", "text", "json", "csv"] | None = Field(
        None,
        description="table; text, with the reasons; json, a line with the whole answer per photo; csv, with a header. "
        "By default a table on a terminal, and text elsewhere",
    )
    top_k: int | None = Field(
        None, ge=1, description="predictions to show; by default 1 in table and csv, and 5 in text and json"
    )
    explain: Path | None = Field(
        None, description="PNG file for a drawing of what was looked at, block by block, of one photo"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.photos.count(STDIN) > 1:
            raise ValueError("stdin holds one image: name - once")
        if (self.patch_grid is None) != (self.keep_rate is None):
            raise ValueError("--patch-grid and --keep-rate go together: give both or none")
        if self.explain and len(self.photos) > 1:
            raise ValueError("--explain draws one photo")
        return self


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


class Key(BaseModel):
    """Make an API key: its entry for a file of keys on stdout, and the key itself, which is kept nowhere, on stderr."""

    name: CliPositionalArg[str] = Field(
        pattern=KEY_NAME, description="of its holder, for metrics: letters, digits, dots, dashes and underscores"
    )
