"""Images as numbers: RGB conversion, the evaluation transform, the training augmentation, image folders.

Training, evaluation and serving share `to_rgb`, `evaluation_transform` and `normalise`, so that what a checkpoint was
measured on is what it is served with.
"""

import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes
from torchvision.transforms import InterpolationMode

from models.crops import RandomCrop
from models.subnetwork import SuperViTConfig

# The strongest posterization that keeps a bit of each channel: at 10 none is left, which Pillow refuses.
MAX_POSTERIZE = 9.9
# A longer picture is cut to this ratio around its centre before resizing, or a 1 x 100,000 px one would fill memory.
MAX_ASPECT_RATIO = 8

# What Pillow's codecs are known to raise on malformed bytes.
CODEC_ERRORS = (
    AssertionError,
    OSError,
    ValueError,
    SyntaxError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
)

# How to turn a picture that its camera stored in another orientation than it is to be seen in (Exif 2.3, table 4).
TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Sample = tuple[Tensor, int]


class DataError(Exception):
    """A data set cannot be used; the message names the folder or file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How training images are varied.

    Attributes:
        rand_augment: timm's RandAugment description such as "rand-m9-mstd0.5-inc1"; None for none.
        random_erasing: probability of erasing a rectangle.
    """

    rand_augment: str | None
    random_erasing: float


class SampleLoader(DataLoader[Sample]):
    """A DataLoader whose worker processes hand on a DataError as the one line that it was."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # a generator is all that a loop needs
        """Yield batches.

        Raises:
            DataError: an image cannot be read.
        """
        try:
            yield from super().__iter__()
        except DataError as error:
            # A worker's error arrives as its type with the whole traceback for a message, which ends in our line.
            _, _, line = str(error).rpartition(f"{DataError.__module__}.{DataError.__name__}: ")
            raise DataError(line.strip()) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded picture of any mode to RGB as a viewer shows it: upright, 8 bits, transparency on white."""
    turn = turn_upright(image)
    return flatten(image if turn is None else image.transpose(turn))


def turn_upright(image: Image.Image) -> Image.Transpose | None:
    """Tell how to turn a picture that its camera stored otherwise; None where it is upright or nothing says so."""
    # ImageOps.exif_transpose does more: it writes the metadata anew, which fails on what some cameras put there, and
    # copies every picture that needs no turning.
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except (SyntaxError, ValueError, TypeError, struct.error):  # broken metadata do not break a picture
        return None


def flatten(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB of 8 bits, transparency on white. One that is RGB is not copied."""
    if image.mode.startswith(("I", "F")):  # 16-bit grey; convert() would clip it to white
        levels = np.asarray(image).clip(0, 65535).astype(np.uint16)
        grey = (levels >> 8).astype(np.uint8)
        grey[levels == image.info.get("transparency")] = 255
        image = Image.fromarray(grey)
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba)  # unlike alpha_composite, it lets other threads run meanwhile
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()  # the file may be closed next
    return image


def resized_side(config: SuperViTConfig) -> int:
    """Tell what the shorter side of a picture is resized to before its centre is cropped, in pixels."""
    return int(config.image_side / config.crop_fraction)


def limit_aspect_ratio(image: Image.Image) -> Image.Image:
    """Cut a picture that is longer than MAX_ASPECT_RATIO around its centre; hand on any other as it is."""
    width, height = image.size
    longest = MAX_ASPECT_RATIO * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, width - left, height - top))


def evaluation_transform(config: SuperViTConfig) -> Callable[[Image.Image], Tensor]:
    """Map an RGB picture of any size to (3, S, S) uint8: resize the shorter side, crop the centre.

    Bicubic with antialiasing, in Pillow, as the published evaluations do.
    """
    return square_transform(resized_side(config), config.image_side)


def square_transform(resized: int, side: int) -> Callable[[Image.Image], Tensor]:
    """Map an RGB picture of any size to (3, side, side) uint8: its shorter side to `resized`, then the centre."""
    steps: list[Callable[..., Any]] = [
        limit_aspect_ratio,
        transforms.Resize(resized, InterpolationMode.BICUBIC),
        transforms.CenterCrop(side),
        transforms.PILToTensor(),
    ]
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
    return composed


def training_transform(config: SuperViTConfig, augmentation: Augmentation) -> Callable[[Image.Image], Tensor]:
    """Map an RGB picture of any size to a random (3, S, S) float32 variation of it, normalised."""
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(
        [RandomCrop(config.image_side), variation(config, augmentation)]
    )
    return composed


def variation(config: SuperViTConfig, augmentation: Augmentation) -> Callable[[Image.Image], Tensor]:
    """Map a square that was cropped for training to a random (3, S, S) float32 variation of it, normalised."""
    steps: list[Callable[..., Any]] = []
    if augmentation.rand_augment:
        fill = tuple(round(255 * channel) for channel in config.mean)
        augment = rand_augment_transform(
            augmentation.rand_augment, {"translate_const": config.image_side // 2, "img_mean": fill}
        )
        for op in augment.ops:
            if op.name == "PosterizeIncreasing":
                op.magnitude_max = min(op.magnitude_max or MAX_POSTERIZE, MAX_POSTERIZE)
        steps += [augment]
    steps += [transforms.ToTensor(), transforms.Normalize(config.mean, config.std)]
    if augmentation.random_erasing:
        steps += [RandomErasing(augmentation.random_erasing, mode="pixel", device="cpu")]
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
    return composed


def normalise(images: Tensor, config: SuperViTConfig) -> Tensor:
    """Scale (B, 3, S, S) uint8 images to [0, 1] and normalise them, float32, on their own device."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (config.mean, config.std))
    return (images.float() / 255 - mean) / std


def list_classes(folder: Path) -> tuple[str, ...]:
    """Name the class folders of `folder`, in the order of their labels.

    Raises:
        DataError: there is no such folder, it holds no class folders, or the name of one is not UTF-8.
    """
    try:
        names = tuple(find_classes(folder)[0])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{folder}: not a folder of class folders: {error}") from error
    for name in names:
        if not is_unicode(name):
            raise DataError(f"{folder}: the class folder {name!r} has a name that is not UTF-8; rename it")
    return names


def is_unicode(name: str) -> bool:
    """Whether a file's name is text, and not bytes that Python can only hand through."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def digest_samples(samples: Dataset[Sample]) -> str:
    """Tell this choice of files, labels and order from any other; the files' contents do not count."""
    part = samples if isinstance(samples, Subset) else Subset(samples, range(len(samples)))  # type: ignore[arg-type] # it has a length
    folder: ImageFolder = part.dataset
    digest = hashlib.sha256()
    for index in part.indices:
        path, label = folder.samples[index]
        digest.update(os.fsencode(f"{os.path.relpath(path, folder.root)}\0{label}\0"))
    return digest.hexdigest()


def open_folder(folder: Path, transform: Callable[[Image.Image], Tensor]) -> ImageFolder:
    """Open a folder of class folders of images.

    Raises:
        DataError: there is none, or one of the classes has no images.
    """
    list_classes(folder)
    try:
        return ImageFolder(str(folder), transform, loader=_load_rgb)
    except FileNotFoundError as error:
        raise DataError(f"{folder}: {error}") from error


def open_training_data(
    data: Path, config: SuperViTConfig, transform: Callable[[Image.Image], Tensor], holdout: float, seed: int
) -> tuple[Dataset[Sample], Dataset[Sample]]:
    """Open `data`/train for training, and what to watch meanwhile: `data`/val, or else a part held out from train.

    A test/ folder is never looked at, so that it stays a test.

    Args:
        data: folder with train/ and perhaps val/, each of class folders.
        config: for the transform of the watched images.
        transform: of the training images.
        holdout: fraction of train/ to hold out where there is no val/.
        seed: of the choice of held-out images.

    Raises:
        DataError: a folder is unusable, train/ has a single class, or val/ has other classes than train/.
    """
    training = open_folder(data / "train", transform)
    if len(training.classes) < 2:
        raise DataError(f"{data / 'train'}: a single class folder leaves nothing to tell apart")
    if (data / "val").is_dir():
        watched = open_folder(data / "val", evaluation_transform(config))
        if watched.classes != training.classes:
            raise DataError(f"{data / 'val'}: its class folders differ from those of train/")
        return training, watched
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed)).tolist()
    num_watched = max(1, round(holdout * len(order)))
    watched = open_folder(data / "train", evaluation_transform(config))
    return Subset(training, sorted(order[num_watched:])), Subset(watched, sorted(order[:num_watched]))


def _load_rgb(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (*CODEC_ERRORS, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image: {error}") from error
