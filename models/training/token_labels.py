"""Token labels from a folder: what a teacher saw at each place of every training image.

For train/CLASS/IMAGE the folder holds CLASS/IMAGE.npz with two (h, w, k) arrays, of the same shape for all images:
`classes`, the k likeliest classes of each place of a grid over the whole picture, and `weights`, their probabilities.
The probability that these leave of 1 is spread evenly over all classes.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from models.data.augmentation import Augmentation, training_crop, variation
from models.data.crops import crop_maps
from models.data.datasets import TrainingSamples
from models.data.images import CODEC_ERRORS
from models.errors import DataError
from models.subnetwork import SuperViTConfig

ROUNDING = 1e-2  # half-precision weights may add up to more than 1 by this much


class CropAndVariation:
    """Map a picture to the output of `training_transform` and to the crop that it shows, as from `RandomCrop.take`."""

    def __init__(self, config: SuperViTConfig, augmentation: Augmentation) -> None:
        self.crop, self.vary = training_crop(config, augmentation), variation(config, augmentation)

    def __call__(self, picture: Image.Image) -> tuple[Tensor, Tensor]:
        """Return the (3, S, S) float32 image and its (5,) float32 crop."""
        square, crop = self.crop.take(picture)
        return self.vary(square), crop


class WithTokenLabels(Dataset[tuple[Tensor, ...]]):
    """Training images with their labels, their maps of token labels, and the crop of its picture that each image shows.

    A sample is an image (3, S, S), its label, the (h, w, k) classes and weights of its map, and its crop (5,).
    """

    def __init__(self, samples: TrainingSamples, folder: Path, num_classes: int) -> None:
        """Hold the samples, and take the shape of all maps from the first one.

        Args:
            samples: training images through `CropAndVariation`.
            folder: the folder of the maps.
            num_classes: number of classes in the data set.

        Raises:
            DataError: the first image has no usable map.
        """
        self.samples, self.folder, self.num_classes = samples, folder, num_classes
        self.shape = read_map(self.path_of(0), num_classes)[0].shape

    def __len__(self) -> int:
        """Number of images, unreadable ones included."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Return one sample; for an unreadable image, the next readable one and its map.

        Raises:
            DataError: too many images cannot be read, or a map is missing, damaged or of another shape than the first.
        """
        (image, crop), label, place = self.samples.take(index)
        path = self.path_of(place)
        classes, weights = read_map(path, self.num_classes)
        if classes.shape != self.shape:
            raise DataError(
                f"{path}: token labels must have the others' shape {tuple(self.shape)}, not {tuple(classes.shape)}"
            )
        return image, torch.as_tensor(label), classes, weights, crop

    def report(self) -> None:
        """Report the unreadable images, as `ImageSet.report` does."""
        self.samples.report()

    def path_of(self, place: int) -> Path:
        """Return the path of an image's map."""
        images = self.samples.images
        image = Path(images.files[place][0]).relative_to(images.folder)
        return self.folder / image.with_name(f"{image.name}.npz")


def read_map(path: Path, num_classes: int) -> tuple[Tensor, Tensor]:
    """Read the (h, w, k) int32 classes and float32 weights of one image.

    Raises:
        DataError: there is no map, or it does not hold token labels for `num_classes` classes.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            classes, weights = arrays["classes"], arrays["weights"].astype(np.float32)
    except (*CODEC_ERRORS, RuntimeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not readable as token labels: {' '.join(str(error).split())}") from error
    if classes.ndim != 3 or classes.shape != weights.shape or not classes.size or classes.dtype.kind not in "iu":
        raise DataError(
            f"{path}: token labels must be two arrays of (h, w, k), not {classes.shape} and {weights.shape}"
        )
    if classes.min() < 0 or classes.max() >= num_classes:
        raise DataError(f"{path}: token labels have class {classes.max()}, but there are {num_classes} classes")
    if not (weights.min() >= 0 and weights.sum(axis=2).max() <= 1 + ROUNDING):  # false for NaN as well
        raise DataError(f"{path}: the weights of a token label must be probabilities")
    return torch.from_numpy(classes.astype(np.int32)), torch.from_numpy(weights)


def cut_token_labels(classes: Tensor, weights: Tensor, crops: Tensor, patch_grid: int, num_classes: int) -> Tensor:
    """Turn label maps over whole pictures into labels for the patch tokens of their crops.

    Args:
        classes: (B, h, w, k) integers.
        weights: (B, h, w, k) probabilities.
        crops: (B, 5), as `RandomCrop.take` returns them.
        patch_grid: patches per side.
        num_classes: length of a label.

    Returns:
        (B, patch_grid * patch_grid, classes) probabilities, row by row.
    """
    batch, height, width, _ = classes.shape
    maps = weights.new_zeros(batch, num_classes, height, width)
    maps.scatter_add_(1, classes.long().movedim(3, 1), weights.movedim(3, 1))
    labels = crop_maps(maps, crops, patch_grid).flatten(2).transpose(1, 2)
    rest = (1 - labels.sum(dim=2, keepdim=True)).clamp(min=0)
    return labels + rest / num_classes
