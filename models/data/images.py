"""Images as numbers: RGB conversion, the evaluation transform, the training augmentation. Knows no labels.

Training, evaluation and serving share `to_rgb`, `evaluation_transform` and `normalise`, so that what a checkpoint was
measured on is what it is served with.
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from models.data.crops import RandomCrop
from models.subnetwork import Interpolation, SuperViTConfig

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

Transform = Callable[[Image.Image], Tensor]

# What stands for a picture that cannot be read, where a batch must have its size.
BLANK = Image.new("RGB", (1, 1))


class UnreadableImageError(Exception):
    """A file is no picture, or a broken one; the message names it."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How training images are varied.

    Attributes:
        rand_augment: timm's RandAugment description such as "rand-m9-mstd0.5-inc1"; None for none.
        random_erasing: probability of erasing a rectangle.
        smallest_crop: share of the picture's area that a random crop shows at least; small pictures are not cropped so.
    """

    rand_augment: str | None
    random_erasing: float
    smallest_crop: float = 0.08


def load_rgb(path: str) -> Image.Image:
    """Decode a file to an RGB picture.

    Raises:
        UnreadableImageError: it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (*CODEC_ERRORS, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UnreadableImageError(f"{path}: not a readable image: {reason}") from error


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


def evaluation_transform(config: SuperViTConfig) -> Transform:
    """Map an RGB picture of any size to (3, S, S) uint8: resize the shorter side, crop the centre.

    With antialiasing, in Pillow, as the published evaluations do.
    """
    return square_transform(resized_side(config), config.image_side, config.interpolation)


def square_transform(resized: int, side: int, interpolation: Interpolation = "bicubic") -> Transform:
    """Map an RGB picture of any size to (3, side, side) uint8: its shorter side to `resized`, then the centre."""
    steps: list[Callable[..., Any]] = [
        limit_aspect_ratio,
        transforms.Resize(resized, InterpolationMode(interpolation)),
        transforms.CenterCrop(side),
        transforms.PILToTensor(),
    ]
    composed: Transform = transforms.Compose(steps)
    return composed


def training_transform(config: SuperViTConfig, augmentation: Augmentation) -> Transform:
    """Map an RGB picture of any size to a random (3, S, S) float32 variation of it, normalised."""
    crop = training_crop(config, augmentation)
    composed: Transform = transforms.Compose([crop, variation(config, augmentation)])
    return composed


def training_crop(config: SuperViTConfig, augmentation: Augmentation) -> RandomCrop:
    """Take a random part of an RGB picture of any size, as a square of S pixels."""
    return RandomCrop(config.image_side, augmentation.smallest_crop, config.interpolation)


def variation(config: SuperViTConfig, augmentation: Augmentation) -> Transform:
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
    composed: Transform = transforms.Compose(steps)
    return composed


def normalise(images: Tensor, config: SuperViTConfig) -> Tensor:
    """Scale (B, 3, S, S) uint8 images to [0, 1] and normalise them, float32, on their own device."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (config.mean, config.std))
    return (images.float() / 255 - mean) / std
