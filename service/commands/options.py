"""Option models of the commands whose options have no better place. Imports no slow library: help waits for it."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_settings import CliPositionalArg

from models.defaults import MAX_BAD_IMAGES, count_cores, default_workers
from service.bench.options import HttpUrl
from service.domain import KEY_NAME
from service.settings import EngineKind, Precision

STDIN = Path("-")


def _named(photos: Any) -> Any:  # noqa: ANN401 - whatever was given
    if "" in photos:  # as from an unset shell variable; as a path, it would be the current folder
        raise ValueError("a file name must not be empty")
    return photos


class Classify(BaseModel):
    """Classify photos, a few at a time, in this process or with a server; answers are in the order of the photos."""

    photos: CliPositionalArg[Annotated[list[Path], BeforeValidator(_named)]] = Field(
        description="image files, folders of images, or - for an image from stdin", min_length=1
    )
    budget_gflops: float | None = Field(None, gt=0, description="maximum cost per photo, in 1e9 multiply-accumulates")
    budget_ms: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="latency budget per photo; by default the server's own, or unlimited in this process",
    )
    min_confidence: float | None = Field(
        None, ge=0, lt=1, description="probability below which a more accurate sub-network looks at the photo again"
    )
    patch_grid: int | None = Field(None, ge=1, description="patch grid of the sub-network to run, instead of a budget")
    keep_rate: float | None = Field(None, gt=0, le=1, description="keep rate of the sub-network; requires --patch-grid")
    url: HttpUrl | None = Field(
        None, description="URL of a server to use instead of this process, e.g. http://127.0.0.1:8000"
    )
    checkpoint: str | None = Field(
        None, description="SuperViT checkpoint to use in this process; by default the one that `serve` uses"
    )
    format: Literal["table", "text", "json", "csv"] | None = Field(
        None,
        description="table; text, with the reasons; json, a line per photo with the whole answer; csv, with a header; "
        "by default table on a terminal and text elsewhere",
    )
    top_k: int | None = Field(
        None, ge=1, description="number of predictions to show; by default 1 for table and csv, and 5 for text and json"
    )
    explain: Path | None = Field(
        None, description="PNG file for a drawing of the patches that each prune block kept, for one photo"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.photos.count(STDIN) > 1:
            raise ValueError("stdin holds one image; - must be given at most once")
        if (self.patch_grid is None) != (self.keep_rate is None):
            raise ValueError("--patch-grid and --keep-rate go together: give both or none")
        if self.patch_grid is not None and self.min_confidence:
            raise ValueError("--min-confidence: not allowed with a sub-network by name, which looks once")
        if self.url is not None and self.checkpoint is not None:
            raise ValueError("--checkpoint: not allowed with --url; a server answers with its own")
        if self.explain and len(self.photos) > 1:
            raise ValueError("--explain takes one photo")
        return self


class Evaluate(BaseModel):
    """Measure top-1 and top-5 of every sub-network and write them into the checkpoint's profile."""

    checkpoint: CliPositionalArg[str] = Field(
        description="SuperViT checkpoint: a path, the name of one that ships, or hf-hub:owner/name[@revision]"
    )
    data: CliPositionalArg[Path] = Field(
        description="folder with val/ to calibrate on and test/ to measure on, or only one of them, with class folders"
    )
    batch_size: int = Field(100, ge=1, description="images per batch")
    max_bad_images: float = Field(
        MAX_BAD_IMAGES, ge=0, lt=1, description="fraction of the images that may be unreadable; these are skipped"
    )
    workers: int = Field(
        default_factory=default_workers, ge=0, description="processes that decode images; by default one per core"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, or auto")
    rates_between: bool = Field(False, description="also measure keep rates in steps of 0.05 between the trained ones")
    half: bool = Field(False, description="round the weights to half precision first, which halves the file size")


class Profile(BaseModel):
    """Measure the latency of each sub-network on this machine, or show an earlier measurement."""

    checkpoint: str | None = Field(None, description="SuperViT checkpoint; by default the one that `serve` uses")
    engine: EngineKind | None = Field(None, description="inference engine")
    device: str | None = Field(None, description="cpu, cuda, cuda:1, or auto")
    precision: Precision | None = Field(None, description="precision of the matrix products")
    threads: int | None = Field(None, ge=1, description="threads of the engine on a CPU; by default as for `serve`")
    max_batch_size: int | None = Field(None, ge=1, le=64, description="largest batch to measure")
    fresh: bool = Field(False, description="measure again even if there is an earlier measurement")
    plot_file: Path | None = Field(None, description="PNG file for a plot of the latencies")


class Quantize(BaseModel):
    """Prepare a checkpoint for int8 inference on CPUs: calibrate on val/, measure on test/."""

    checkpoint: CliPositionalArg[str] = Field(
        description="SuperViT checkpoint: a path, the name of one that ships, or hf-hub:owner/name[@revision]"
    )
    data: CliPositionalArg[Path] = Field(
        description="folder with val/ to calibrate on and test/ to measure on, or only one of them, with class folders"
    )
    output: Path | None = Field(
        None,
        description="file to write; by default the checkpoint itself, or a file in the current folder if found by name",
    )
    batch_size: int = Field(16, ge=1, description="images per batch")
    max_bad_images: float = Field(
        MAX_BAD_IMAGES, ge=0, lt=1, description="fraction of the images that may be unreadable; these are skipped"
    )
    workers: int = Field(0, ge=0, description="processes that decode images while the engine runs; by default none")
    threads: int = Field(default_factory=count_cores, ge=1, description="engine threads; by default one per core")


class Key(BaseModel):
    """Create an API key: its entry for a file of keys on stdout; the key itself, which is not stored, on stderr."""

    name: CliPositionalArg[str] = Field(
        pattern=KEY_NAME,
        description="name of the key's holder, for metrics: letters, digits, dots, dashes and underscores",
    )
