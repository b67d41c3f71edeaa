"""The options of a training run, with defaults that depend on the size of the data set. Trains nothing.

Modules that read weights or images import torch; they are imported only when needed, so `--help` does without torch.
"""

import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from pydantic_settings import CliPositionalArg

from models.defaults import MAX_BAD_IMAGES, default_workers
from models.errors import DataError
from models.files.checkpoint_errors import CheckpointError
from models.subnetwork import Interpolation, SuperViTConfig

# Between CIFAR (50,000) and ImageNet (1.28 million): from this size on, the strong augmentation of DeiT pays off.
LARGE_DATASET_IMAGES = 200_000

# "small" is meant for tens of thousands of images; the others are the published recipes, by the flavour of the model.
DEFAULTS: dict[str, dict[str, Any]] = {
    "deit": {
        "epochs": 300,
        "optimizer": "adamw",
        "batch_size": 256,
        "mixup": 0.8,
        "cutmix": 1.0,
        "mix_token": False,
        "rand_augment": "rand-m9-mstd0.5-inc1",
        "random_erasing": 0.25,
        "drop_path": 0.1,
        "ema_decay": 0.99996,
        "augmentation_repeats": 3,
    },
    "lvvit": {
        "epochs": 300,
        "optimizer": "adamw",
        "batch_size": 256,
        "mixup": 0.0,
        "cutmix": 0.0,
        "mix_token": True,
        "rand_augment": "rand-m9-mstd0.5-inc1",
        "random_erasing": 0.25,
        "drop_path": 0.1,
        "ema_decay": 0.99992,
        "augmentation_repeats": 1,
    },
    "small": {
        "epochs": 100,
        "optimizer": "muon",
        "batch_size": 64,
        "mixup": 0.0,
        "cutmix": 0.0,
        "mix_token": False,
        "rand_augment": "",
        "random_erasing": 0.0,
        "drop_path": 0.0,
        "ema_decay": 0.999,
        "augmentation_repeats": 1,
    },
}

# Peak learning rates per 512 images in a step. Muon's rate for small sets comes from trials on CIFAR-10; its others
# have the same ratio to AdamW's and are untested.
LEARNING_RATES = {
    "adamw": {"deit": 5e-4, "lvvit": 8e-4, "small": 4e-3},
    "muon": {"deit": 5e-3, "lvvit": 8e-3, "small": 4e-2},
}
# Options about patch tokens, which apply to an LV-ViT only.
TOKEN_OPTIONS = ("mix_token", "token_label_weight", "token_labels", "teacher_tokens")

# Defaults for fine-tuning `init` on new classes. The learning rate decays by layer because the blocks near the images
# should change least (Bao et al., BEiT, ICLR 2022). Crops of a tenth of an image suit training from scratch; in a short
# fine-tuning they cost more than they gain.
FINE_TUNING = {"learning_rate": 3e-3, "layer_decay": 0.75, "smallest_crop": 0.3}

# The descriptions that timm understands; it ignores or refuses anything else without an error message.
RAND_AUGMENT = r"^(rand(-(m\d+|n\d+|p(0|1|0?\.\d+)|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(weights|3aw?)))*)?$"


@cache
def count_training_files(data: Path) -> int:
    """Count the files under `data`/train."""
    return sum(len(files) for _, _, files in os.walk(data / "train", followlinks=True))


@cache
def flavour_of(model: str, init: Path | None) -> str:
    """Return the flavour of a run's model: that of the initial weights if they state one, else that of its name."""
    from models.conversion.convert import open_initial  # imports timm, which only a run that starts from weights needs

    with suppress(CheckpointError):  # the run itself will report it
        if init and (config := open_initial(init, num_heads=1).config):
            return config.flavour
    return "lvvit" if model.startswith("supervit_lvvit_") else "deit"


def _kind(fields: dict[str, Any]) -> str:
    """Return the key of the DEFAULTS that suit the training set and the model."""
    if count_training_files(fields["data"]) < LARGE_DATASET_IMAGES:
        return "small"
    return flavour_of(fields["model"], fields["init"])


def _fine_tunes(fields: dict[str, Any]) -> bool:
    """Return whether the run starts from existing weights and its classes differ from theirs."""
    return fields["init"] is not None and has_new_classes(fields["init"], fields["data"])


@cache
def has_new_classes(init: Path, data: Path) -> bool:
    """Return whether the head of `init` does not fit the classes under `data`/train; False if either is unusable."""
    from models.conversion.convert import open_initial
    from models.data.datasets import list_classes

    try:
        return not open_initial(init, num_heads=1).has_head_for(list_classes(data / "train"))
    except (CheckpointError, DataError):  # the run itself will report it
        return False


def _by_size(name: str, **constraints: Any) -> Any:  # noqa: ANN401 - as pydantic's Field
    """Declare a field whose default depends on the number of files under train/ and, for a large set, on the model."""

    def default(fields: dict[str, Any]) -> Any:  # noqa: ANN401 - of the field's own type
        return DEFAULTS[_kind(fields)][name]

    return Field(default_factory=default, **constraints)


class Recipe(BaseModel):
    """Train a SuperViT on a folder of images. Some defaults depend on the size of the training set."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: CliPositionalArg[Path] = Field(description="folder with train/, optionally val/ or test/, with class folders")
    output: Path = Field(description="folder for the checkpoint, the training state, the log and its plot")
    resume: bool = Field(False, description="resume from the state in the output folder")

    model: str = Field("supervit_lvvit_micro_patch4_32", description="name of a registered SuperViT")
    width: PositiveInt | None = Field(None, description="token width instead of the model's")
    depth: PositiveInt | None = Field(None, description="number of blocks instead of the model's")
    num_heads: PositiveInt | None = Field(None, description="attention heads instead of the model's")
    stem_width: PositiveInt | None = Field(
        None, description="channels of the convolutional stem instead of the model's"
    )
    patch_kernel: PositiveInt | None = Field(None, description="patch side in pixels instead of the model's")
    patch_grids: tuple[int, ...] | None = Field(None, description="trained patch grids instead of the model's")
    keep_rates: tuple[float, ...] | None = Field(None, description="trained keep rates instead of the model's")
    prune_blocks: tuple[int, ...] | None = Field(None, description="blocks that prune instead of the model's")
    fuse_pruned: bool | None = Field(None, description="fuse pruned tokens into one, as in EViT")
    mean: tuple[float, float, float] | None = Field(None, description="RGB mean in [0, 1] instead of the model's")
    std: tuple[float, float, float] | None = Field(None, description="RGB standard deviation, likewise")
    interpolation: Interpolation | None = Field(None, description="filter for resizing images, instead of the model's")
    crop_fraction: float | None = Field(None, description="evaluation crop fraction instead of the model's")
    init: Path | None = Field(
        None,
        description="SuperViT or plain ViT weights to start from; also sets the architecture, except given options",
    )
    fit_head: bool = Field(
        default_factory=lambda fields: _fine_tunes(fields),
        description="fit a linear head on the features of init before training; by default if the classes are new",
    )
    layer_decay: float = Field(
        default_factory=lambda fields: FINE_TUNING["layer_decay"] if _fine_tunes(fields) else 1.0,
        gt=0,
        le=1,
        description="factor on the learning rate from each block to the one before it; below 1 if the classes are new",
    )

    teacher: str | None = Field(None, description="timm model to distil from, e.g. regnety_160")
    teacher_checkpoint: Path | None = Field(None, description="weights of the teacher; timm's own by default")
    teacher_side: PositiveInt | None = Field(None, description="image side of the teacher in pixels, instead of timm's")
    teacher_weight: float = Field(0.5, ge=0, le=1, description="share of the teacher in the classification loss")
    teacher_self: bool = Field(
        False, description="use the largest sub-network of init, frozen, as the teacher of all, instead of a timm model"
    )
    teacher_once: bool = Field(
        False, description="run the teacher once on each image, before training, instead of on every variation"
    )
    teacher_tokens: bool = Field(
        False, description="label each patch token with the teacher's output at its place in the image"
    )
    token_labels: Path | None = Field(
        None, description="folder with a map of labels for every training image; the image's label by default"
    )
    token_label_weight: float = Field(1.0, gt=0, description="weight of the loss of an LV-ViT's patch tokens")

    epochs: PositiveInt = _by_size("epochs", description="passes over the training images")
    single_epochs: int = Field(
        0, ge=0, description="number of first epochs whose steps train one unpruned sub-network each, at a random grid"
    )
    single_pruned: bool = Field(
        False, description="also prune in the single epochs, at a random keep rate; for pretrained weights"
    )
    batch_size: PositiveInt = _by_size("batch_size", description="images per batch and process")
    accumulate: PositiveInt = Field(1, description="batches whose gradients are averaged into one step")
    optimizer: Literal["adamw", "muon"] = Field(
        default_factory=lambda fields: "adamw" if _fine_tunes(fields) else DEFAULTS[_kind(fields)]["optimizer"],
        description="AdamW, or Muon for matrices and convolutions and AdamW for the rest",
    )
    learning_rate: float = Field(
        default_factory=lambda fields: (
            FINE_TUNING["learning_rate"]
            if fields["optimizer"] == "adamw" and _fine_tunes(fields)
            else LEARNING_RATES[fields["optimizer"]][_kind(fields)]
        ),
        gt=0,
        description="peak learning rate per 512 images of a step",
    )
    warmup_epochs: float = Field(5, ge=0, description="epochs of linear warm-up, at most a tenth of the run")
    weight_decay: float = Field(0.05, ge=0, description="decoupled weight decay of matrices")
    clip_grad: float | None = Field(None, gt=0, description="maximum norm of a step's gradient; no clipping by default")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="probability mass spread over all classes")
    mixup: float = _by_size("mixup", ge=0, description="mixup alpha; 0 for none")
    cutmix: float = _by_size("cutmix", ge=0, description="cutmix alpha; 0 for none")
    mix_token: bool = _by_size(
        "mix_token", description="exchange the patch tokens of a box between the images of a batch, after the embedding"
    )
    rand_augment: str = _by_size(
        "rand_augment", pattern=RAND_AUGMENT, description='timm RandAugment, e.g. rand-m9-mstd0.5-inc1; "" for none'
    )
    smallest_crop: float = Field(
        default_factory=lambda fields: FINE_TUNING["smallest_crop"] if _fine_tunes(fields) else 0.08,
        gt=0,
        le=1,
        description="smallest share of an image's area in a random crop; for inputs over 64 pixels a side",
    )
    random_erasing: float = _by_size("random_erasing", ge=0, le=1, description="probability of erasing a rectangle")
    augmentation_repeats: PositiveInt = _by_size(
        "augmentation_repeats", description="times each picked image appears in an epoch"
    )
    drop_path: float = _by_size("drop_path", ge=0, lt=1, description="stochastic depth rate of the last block")
    freeze_batch_norm: bool = Field(
        False,
        description="normalise by the stem's running statistics, as in serving, instead of by those of each batch",
    )
    ema_decay: float = _by_size("ema_decay", ge=0, lt=1, description="decay of the averaged weights that are saved")

    holdout: float = Field(
        0.02, gt=0, lt=1, description="fraction of train/ held out for validation if there is no val/ folder"
    )
    max_bad_images: float = Field(
        MAX_BAD_IMAGES, ge=0, lt=1, description="fraction of the images that may be unreadable; these are skipped"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of weights, order and augmentation")
    workers: int = Field(
        default_factory=default_workers, ge=0, description="processes that decode images; by default one per core"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, or auto")
    precision: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="precision of the products in a step; by default bfloat16 if the device has instructions for it, "
        "else float16 on a GPU and float32 on a CPU",
    )
    compile: bool = Field(
        False, description="compile the training step, once for every grid with its keep rates; pays off in long runs"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        given = {name for name in self.model_fields_set if getattr(self, name)}
        if self.teacher and self.teacher_self:
            raise ValueError("teacher and teacher-self are mutually exclusive")
        for name in ("fit_head", "teacher_self"):
            if getattr(self, name) and not self.init:
                raise ValueError(f"{name.replace('_', '-')} requires --init")
        for name in ("teacher_checkpoint", "teacher_side", "teacher_weight", "teacher_once", "teacher_tokens"):
            has_one = self.teacher or (self.teacher_self and name in ("teacher_weight", "teacher_once"))
            if name in given and not has_one:
                raise ValueError(f"{name.replace('_', '-')} requires a teacher; give one with --teacher")
        for name in TOKEN_OPTIONS:
            if name in given and flavour_of(self.model, self.init) != "lvvit":
                raise ValueError(f"{name.replace('_', '-')} is only supported for an LV-ViT, not a DeiT")
        if self.single_epochs > self.epochs:
            raise ValueError(f"single-epochs must be at most epochs ({self.epochs}), not {self.single_epochs}")
        if self.teacher_once and (self.mixup or self.cutmix):
            raise ValueError("teacher-once does not support mixup and cutmix")
        if self.teacher_tokens and (self.teacher_once or self.token_labels):
            raise ValueError("teacher-tokens cannot be combined with teacher-once or token-labels")
        if self.token_labels and (self.mixup or self.cutmix):
            raise ValueError("token-labels does not support mixup and cutmix")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch-size, not {self.batch_size}")
        return self

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields of the model's SuperViTConfig that this recipe replaces."""
        shared = self.model_fields_set & set(SuperViTConfig.__dataclass_fields__)
        return {name: getattr(self, name) for name in shared if getattr(self, name) is not None}
