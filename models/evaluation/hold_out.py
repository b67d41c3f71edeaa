"""Which images to calibrate on and which to measure on, with the labels of a checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from models.checkpoint import Checkpoint
from models.data.datasets import ImageSet, difference, list_classes, open_folder, stratified_order
from models.data.images import evaluation_transform
from models.errors import DataError
from models.published import class_indices


def open_hold_out(
    checkpoint: Checkpoint, data: Path, max_bad_images: float, limit: int
) -> tuple[ImageSet, list[int], ImageSet]:
    """Open the images of `data`/val to calibrate on, and those of `data`/test to measure on.

    Returns:
        The images to calibrate on, the indices of at most `limit` of them that are used, and the images to measure on.
        Where only one folder exists, both sets are the same, and at most half of it is used to calibrate.

    Raises:
        DataError: the data set is unusable, or a class folder is not one of the checkpoint's classes.
    """
    folders = [folder for folder in (data / "val", data / "test") if folder.is_dir()]
    if not folders:
        raise DataError(f"{data}: holds neither val/ nor test/")
    sets = [_open_labelled(checkpoint, folder, max_bad_images) for folder in folders]
    calibrating, measuring = sets[0], sets[-1]
    return calibrating, choose_for_calibration(calibrating, limit, is_measured_too=len(sets) == 1), measuring


def _open_labelled(checkpoint: Checkpoint, folder: Path, max_bad_images: float) -> ImageSet:
    """Open the images of a folder with the checkpoint's labels."""
    indices = label_indices(folder, list_classes(folder), checkpoint.class_names)
    images = open_folder(folder, evaluation_transform(checkpoint.config), max_bad_images)
    images.report_skipped_files()
    images.files = [(path, indices[label]) for path, label in images.files]
    return images


def choose_for_calibration(images: ImageSet, limit: int, *, is_measured_too: bool) -> list[int]:
    """Choose the images to fit scalings on, the same share of every class, and at most half if the rest is measured.

    Raises:
        DataError: there is only one image, which leaves none to measure.
    """
    order = stratified_order([label for _, label in images.files], seed=0)
    most = len(order) // 2 if is_measured_too else len(order)
    if most == 0:
        raise DataError(f"{images.folder}: at least two images are needed to calibrate and to measure")
    return sorted(order[: min(most, limit)])


def label_indices(folder: Path, folder_names: Sequence[str], class_names: tuple[str, ...]) -> list[int]:
    """Return the logit index of each class folder, found by class name or, for ImageNet, by WordNet ID.

    Some classes may have no folder.

    Raises:
        DataError: a folder is not a class of the checkpoint.
    """
    indices = class_indices(class_names)
    if any(name not in indices for name in folder_names):
        found = [class_names[indices[name]] if name in indices else name for name in folder_names]
        differences = difference(class_names, found)
        raise DataError(f"{folder}: its class folders differ from the checkpoint's classes: {differences}")
    return [indices[name] for name in folder_names]
