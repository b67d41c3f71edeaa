"""The options of a training run, with defaults that follow the size of the data set. Holds values, trains nothing."""

import os
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from pydantic_settings import CliPositionalArg

from models.subnetwork import SuperViTConfig

# Between CIFAR (50,000) and ImageNet (1.28 million): above it, the strong augmentation of DeiT pays.
LARGE_DATASET_IMAGES = 200_000

# "small" is for tens of thousands of images; the others are the published recipes, by the flavour of the model.
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

# Peak rates per 512 images of a step. Muon's for small sets comes from trials on CIFAR-10; its others are in the same
# proportion to AdamW's, and untried.
LEARNING_RATES = {
    "adamw": {"deit": 5e-4, "lvvit": 8e-4, "small": 4e-3},
    "muon": {"deit": 5e-3, "lvvit": 8e-3, "small": 4e-2},
}
# Options that say something of patch tokens, which only an LV-ViT is asked about.
TOKEN_OPTIONS = ("mix_token", "token_label_weight", "token_labels", "teacher_tokens")

# All that timm understands; it ignores, or refuses without a word, whatever else a description holds.
RAND_AUGMENT = r"^(rand(-(m\d+|n\d+|p(0|1|0?\.\d+)|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(weights|3aw?)))*)?$"


@cache
def count_training_files(data: Path) -> int:
    """Count the files under `data`/train."""
    return sum(len(files) for _, _, files in os.walk(data / "train", followlinks=True))


def _is_lvvit(model: str) -> bool:
    """Tell by its name whether a registered SuperViT is an LV-ViT."""
    return model.startswith("supervit_lvvit_")


def _kind(fields: dict[str, Any]) -> str:
    """Tell which defaults suit the training set and the model."""
    if count_training_files(fields["data"]) < LARGE_DATASET_IMAGES:
        return "small"
    return "lvvit" if _is_lvvit(fields["model"]) else "deit"


def _by_size(name: str, **constraints: Any) -> Any:  # noqa: ANN401 - as pydantic's Field
    """Declare a field whose default follows the number of files under train/ and, where there are many, the model."""

    def default(fields: dict[str, Any]) -> Any:  # noqa: ANN401 - of the field's own type
        return DEFAULTS[_kind(fields)][name]

    return Field(default_factory=default, **constraints)


class Recipe(BaseModel):
    """Options of `supervit train`. What is left out follows the size of the training set."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: CliPositionalArg[Path] = Field(description="folder with train/ and perhaps val/ or test/, of class folders")
    output: Path = Field(description="folder for the checkpoint, the training state, the log and its picture")
    resume: bool = Field(False, description="go on from the state in the output folder")

    model: str = Field("supervit_lvvit_micro_patch4_32", description="a registered SuperViT")
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
    fuse_pruned: bool | None = Field(None, description="whether pruned tokens are fused into one, as in EViT")
    init: Path | None = Field(None, description="weights to start from: a SuperViT checkpoint or a plain timm DeiT")

    teacher: str | None = Field(None, description="timm model to distil from, e.g. regnety_160")
    teacher_checkpoint: Path | None = Field(None, description="the teacher's weights; timm's own where left out")
    teacher_side: PositiveInt | None = Field(None, description="pixels to resize its images to instead of timm's")
    teacher_weight: float = Field(0.5, ge=0, le=1, description="share of the teacher in the classification loss")
    teacher_once: bool = Field(
        False, description="ask the teacher once about each image, before training, instead of about every variation"
    )
    teacher_tokens: bool = Field(
        False, description="what the teacher sees at every place of an image is the label of that patch token"
    )
    token_labels: Path | None = Field(
        None, description="folder with a map of labels for every training image; the image's label where left out"
    )
    token_label_weight: float = Field(1.0, gt=0, description="of the loss of an LV-ViT's patch tokens")

    epochs: PositiveInt = _by_size("epochs", description="passes over the training images")
    single_epochs: int = Field(
        0, ge=0, description="of these, the first whose steps train one sub-network each, a random grid unpruned"
    )
    batch_size: PositiveInt = _by_size("batch_size", description="images per step and process")
    optimizer: Literal["adamw", "muon"] = _by_size(
        "optimizer", description="AdamW, or Muon for matrices and convolutions and AdamW for the rest"
    )
    learning_rate: float = Field(
        default_factory=lambda fields: LEARNING_RATES[fields["optimizer"]][_kind(fields)],
        gt=0,
        description="peak rate per 512 images of a step",
    )
    warmup_epochs: float = Field(5, ge=0, description="epochs of linear warm-up, at most a tenth of the run")
    weight_decay: float = Field(0.05, ge=0, description="decoupled weight decay of matrices")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="probability mass spread over all classes")
    mixup: float = _by_size("mixup", ge=0, description="mixup alpha; 0 for none")
    cutmix: float = _by_size("cutmix", ge=0, description="cutmix alpha; 0 for none")
    mix_token: bool = _by_size(
        "mix_token", description="let the images of a batch exchange the patch tokens of a box, once embedded"
    )
    rand_augment: str = _by_size(
        "rand_augment", pattern=RAND_AUGMENT, description='timm RandAugment, e.g. rand-m9-mstd0.5-inc1; "" for none'
    )
    random_erasing: float = _by_size("random_erasing", ge=0, le=1, description="probability of erasing a rectangle")
    augmentation_repeats: PositiveInt = _by_size(
        "augmentation_repeats", description="times each picked image appears in an epoch"
    )
    drop_path: float = _by_size("drop_path", ge=0, lt=1, description="stochastic depth of the last block")
    freeze_batch_norm: bool = Field(
        False,
        description="normalise by the stem's running statistics, as in serving, instead of by those of each batch",
    )
    ema_decay: float = _by_size("ema_decay", ge=0, lt=1, description="decay of the averaged weights that are saved")

    holdout: float = Field(
        0.02, gt=0, lt=1, description="part of train/ watched during training where there is no val/ folder"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of weights, order and augmentation")
    workers: int = Field(2, ge=0, description="processes that decode images")
    device: str = Field("auto", description="cpu, cuda, cuda:1, or auto")
    precision: Literal["bfloat16", "float32"] = Field("bfloat16", description="of the products in a training step")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        given = {name for name in self.model_fields_set if getattr(self, name)}
        for name in ("teacher_checkpoint", "teacher_side", "teacher_weight", "teacher_once", "teacher_tokens"):
            if name in given and not self.teacher:
                raise ValueError(f"{name.replace('_', '-')} without a teacher teaches nothing; name one with --teacher")
        for name in TOKEN_OPTIONS:
            if name in given and not _is_lvvit(self.model):
                raise ValueError(f"{name.replace('_', '-')} is for the patch tokens of an LV-ViT, not for {self.model}")
        if self.single_epochs >= self.epochs:
            raise ValueError(f"{self.single_epochs} single epochs of {self.epochs} leave none to teach pruning")
        if self.teacher_once and (self.mixup or self.cutmix):
            raise ValueError("a teacher that is asked once knows nothing of mixup and cutmix")
        if self.teacher_tokens and (self.teacher_once or self.token_labels):
            raise ValueError("teacher-tokens are those of every variation: not with teacher-once or token-labels")
        if self.token_labels and (self.mixup or self.cutmix):
            raise ValueError("token labels of a folder know nothing of mixup and cutmix")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch-size, not {self.batch_size}")
        return self

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields of the model's SuperViTConfig that this recipe replaces."""
        shared = self.model_fields_set & set(SuperViTConfig.__dataclass_fields__)
        return {name: getattr(self, name) for name in shared if getattr(self, name) is not None}
