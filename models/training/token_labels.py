"""Token labels from a folder: what the places of each training image show, as a teacher once saw them.

Of train/CLASS/IMAGE the folder holds CLASS/IMAGE.npz, with two arrays of (h, w, k), alike in shape for all images:
`classes`, the k likeliest classes of each place of a grid over the whole picture, and `weights`, their probabilities.
What these leave of 1 belongs to all classes alike.
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

ROUNDING = 1e-2  # by which half-precision weights may add up to more than 1


class CropAndVariation:
    """Map a picture to what `training_transform` makes of it and to the crop that this shows, as `RandomCrop` says."""

    def __init__(self, config: SuperViTConfig, augmentation: Augmentation) -> None:
        self.crop, self.vary = training_crop(config, augmentation), variation(config, augmentation)

    def __call__(self, picture: Image.Image) -> tuple[Tensor, Tensor]:
        """Give (3, S, S) float32 and (5,) float32."""
        square, crop = self.crop.take(picture)
        return self.vary(square), crop


class WithTokenLabels(Dataset[tuple[Tensor, ...]]):
    """Training images with their labels, their maps of token labels, and the crop of each picture that is to be seen.

    A sample is an image (3, S, S), its label, the (h, w, k) classes and weights of its map, and its crop (5,).
    """

    def __init__(self, samples: TrainingSamples, folder: Path, num_classes: int) -> None:
        """Find the maps.

        Args:
            samples: of images through `CropAndVariation`.
            folder: of the maps.
            num_classes: of the data set.

        Raises:
            DataError: the first image has no map that can be used.
        """
        self.samples, self.folder, self.num_classes = samples, folder, num_classes
        self.shape = read_map(self.path_of(0), num_classes)[0].shape

    def __len__(self) -> int:
        """Images, unreadable ones included."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """One sample; for an image that cannot be read, the next that can, with the map of that one.

        Raises:
            DataError: too many images cannot be read, or a map is missing, damaged or of another shape than the first.
        """
        (image, crop), label, place = self.samples.take(index)
        path = self.path_of(place)
        classes, weights = read_map(path, self.num_classes)
        if classes.shape != self.shape:
            raise DataError(
                f"{path}: token labels of shape {tuple(classes.shape)}, where others are {tuple(self.shape)}"
            )
        return image, torch.as_tensor(label), classes, weights, crop

    def report(self) -> None:
        """As of the images."""
        self.samples.report()

    def path_of(self, place: int) -> Path:
        """Name the file of an image's map."""
        images = self.samples.images
        image = Path(images.files[place][0]).relative_to(images.folder)
        return self.folder / image.with_name(f"{image.name}.npz")


def read_map(path: Path, num_classes: int) -> tuple[Tensor, Tensor]:
    """Read the (h, w, k) classes, int32, and weights, float32, of one image.

    Raises:
        DataError: there are none, or they are not token labels of so many classes.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            classes, weights = arrays["classes"], arrays["weights"].astype(np.float32)
    except (*CODEC_ERRORS, RuntimeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: no token labels: {' '.join(str(error).split())}") from error
    if classes.ndim != 3 or classes.shape != weights.shape or not classes.size or classes.dtype.kind not in "iu":
        raise DataError(f"{path}: token labels are two arrays of (h, w, k), not {classes.shape} and {weights.shape}")
    if classes.min() < 0 or classes.max() >= num_classes:
        raise DataError(f"{path}: token labels name class {classes.max()} where there are {num_classes}")
    if not (weights.min() >= 0 and weights.sum(axis=2).max() <= 1 + ROUNDING):  # not of NaN either
        raise DataError(f"{path}: the weights of a token label are no probabilities")
    return torch.from_numpy(classes.astype(np.int32)), torch.from_numpy(weights)


def cut_token_labels(classes: Tensor, weights: Tensor, crops: Tensor, patch_grid: int, num_classes: int) -> Tensor:
    """Turn maps over whole pictures into labels for the patch tokens of their crops.

    Args:
        classes: (B, h, w, k) integers.
        weights: (B, h, w, k).
        crops: (B, 5), as `RandomCrop.take` gives them.
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
