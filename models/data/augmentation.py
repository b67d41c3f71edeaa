"""Augmentation of training pictures: a random crop, RandAugment, random erasing. Does not handle labels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from models.data.crops import RandomCrop
from models.data.images import Transform
from models.subnetwork import SuperViTConfig

# The strongest posterization that keeps a bit of each channel: at 10 none is left, which Pillow refuses.
MAX_POSTERIZE = 9.9


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How training images are augmented.

    Attributes:
        rand_augment: timm's RandAugment description such as "rand-m9-mstd0.5-inc1"; None for none.
        random_erasing: probability of erasing a rectangle.
        smallest_crop: smallest share of the picture's area that a random crop shows; not used for small pictures.
    """

    rand_augment: str | None
    random_erasing: float
    smallest_crop: float = 0.08


def training_transform(config: SuperViTConfig, augmentation: Augmentation) -> Transform:
    """Return the transform of an RGB picture of any size to a random (3, S, S) float32 variation, normalised."""
    crop = training_crop(config, augmentation)
    composed: Transform = transforms.Compose([crop, variation(config, augmentation)])
    return composed


def training_crop(config: SuperViTConfig, augmentation: Augmentation) -> RandomCrop:
    """Return the crop of a random part of an RGB picture of any size to a square of S pixels."""
    return RandomCrop(config.image_side, augmentation.smallest_crop, config.interpolation)


def variation(config: SuperViTConfig, augmentation: Augmentation) -> Transform:
    """Return the transform of a square cropped for training to a random (3, S, S) float32 variation, normalised."""
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
