"""Every sub-network on labelled images: the accuracy table of a checkpoint, and how far its probabilities are right."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from models.calibration import Scaling, expected_calibration_error, fit_scaling
from models.checkpoint import Checkpoint
from models.data import DataError, Sample, SampleLoader, evaluation_transform, normalise, open_folder
from models.devices import resolve_device
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from models.supervit import SuperViT

Progress = Callable[[DataLoader[Sample]], Iterable[tuple[Tensor, Tensor]]]

# Enough for the two numbers that are fitted, and few enough to keep all their logits over a thousand classes.
CALIBRATION_IMAGES = 5000


@dataclass(frozen=True, slots=True)
class Measured:
    """What one sub-network was found to do: fractions 0..1."""

    top1: float
    top5: float
    calibration_error: float


def evaluate(
    checkpoint: Checkpoint,
    data: Path,
    *,
    batch_size: int,
    workers: int,
    progress: Progress,
    device: str = "auto",
    rates_between: bool = False,
) -> ProfileTable:
    """Fit the scaling of every sub-network on val/ and measure it on test/.

    In float32; on a GPU, convolutions are in TF32, as torch has them by default. Where
    there is only one of the two folders, it serves for both.

    Args:
        checkpoint: the weights; its model is moved to `device`.
        data: folder with val/, test/ or both, of class folders.
        batch_size: images per batch.
        workers: processes that decode images.
        progress: wraps the batches to show how far the work is.
        device: name of the device to run on, as `resolve_device` understands it.
        rates_between: whether to add keep rates between those of the checkpoint's profile.

    Returns:
        The checkpoint's profile with what was measured.

    Raises:
        DataError: the data set is unusable, or a class folder is none of the checkpoint's classes.
        DeviceError: the device cannot be used.
    """
    folders = [folder for folder in (data / "val", data / "test") if folder.is_dir()]
    if not folders:
        raise DataError(f"{data}: holds neither val/ nor test/")
    model = checkpoint.model.to(resolve_device(device))
    held_out, measuring = _open_split(checkpoint, folders[0], CALIBRATION_IMAGES), _open_split(checkpoint, folders[-1])

    def batches(images: Dataset[Sample]) -> Iterable[tuple[Tensor, Tensor]]:
        return progress(SampleLoader(images, batch_size, num_workers=workers))

    profile = checkpoint.profile.with_rates_between(checkpoint.config) if rates_between else checkpoint.profile
    scalings = fit_scalings(model, batches(held_out), profile.by_subnetwork)
    measured = measure_accuracy(model, batches(measuring), scalings)
    return ProfileTable(
        tuple(
            replace(
                row,
                top1=measured[row.subnetwork].top1,
                top5=measured[row.subnetwork].top5,
                is_interpolated=False,
                temperature=scalings[row.subnetwork].temperature,
                entropy_exponent=scalings[row.subnetwork].entropy_exponent,
                calibration_error=measured[row.subnetwork].calibration_error,
            )
            for row in profile.rows
        )
    )


def _open_split(checkpoint: Checkpoint, folder: Path, at_most: int | None = None) -> Subset[Sample]:
    """Open the images of a folder with the checkpoint's labels, or about so many from all over it."""
    images = open_folder(folder, evaluation_transform(checkpoint.config))
    images.target_transform = label_indices(folder, images.classes, checkpoint.class_names).__getitem__
    every = math.ceil(len(images) / at_most) if at_most else 1
    return Subset(images, range(0, len(images), every))


def label_indices(folder: Path, folder_names: list[str], class_names: tuple[str, ...]) -> list[int]:
    """Find the logit of each class folder, by the class name or, for ImageNet, by its WordNet number.

    Raises:
        DataError: a folder is no class of the checkpoint.
    """
    indices = {name: index for index, name in enumerate(class_names)}
    imagenet = ImageNetInfo()
    if class_names == tuple(imagenet.label_descriptions()):
        indices |= {name: index for index, name in enumerate(imagenet.label_names())}
    unknown = [name for name in folder_names if name not in indices]
    if unknown:
        raise DataError(f"{folder}: class folder {unknown[0]!r} is no class of the checkpoint ({len(unknown)} such)")
    return [indices[name] for name in folder_names]


def count_correct(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """Count the rows of (B, classes) logits whose best, and whose best five, hold the label in (B,) `labels`."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return int(hits[:, 0].sum()), int(hits.any(dim=1).sum())


def fit_scalings(
    model: SuperViT, batches: Iterable[tuple[Tensor, Tensor]], subnetworks: Iterable[SubNetwork]
) -> dict[SubNetwork, Scaling]:
    """Find the scaling of each sub-network on images that its weights were not trained on.

    Args:
        model: in eval mode, on the device where it shall run.
        batches: (B, 3, S, S) uint8 images with their (B,) labels; read once.
        subnetworks: those to calibrate.
    """
    logits: dict[SubNetwork, list[Tensor]] = {subnetwork: [] for subnetwork in subnetworks}
    all_labels = []
    with torch.inference_mode():
        for images, labels in batches:
            normalised = normalise(images.to(model.cls_token.device), model.config)
            for subnetwork, answers in logits.items():
                answers.append(model(normalised, subnetwork).cpu())
            all_labels.append(labels)
    labels = torch.cat(all_labels)
    return {subnetwork: fit_scaling(torch.cat(answers), labels) for subnetwork, answers in logits.items()}


@torch.inference_mode()
def measure_accuracy(
    model: SuperViT, batches: Iterable[tuple[Tensor, Tensor]], scalings: Mapping[SubNetwork, Scaling]
) -> dict[SubNetwork, Measured]:
    """Measure top-1, top-5 and the calibration error of each sub-network.

    Args:
        model: in eval mode, on the device where it shall run.
        batches: (B, 3, S, S) uint8 images with their (B,) labels; read once.
        scalings: by sub-network.

    Raises:
        ValueError: there are no images.
    """
    device = model.cls_token.device
    correct = {subnetwork: [0, 0] for subnetwork in scalings}
    confidences: dict[SubNetwork, list[Tensor]] = {subnetwork: [] for subnetwork in scalings}
    hits: dict[SubNetwork, list[Tensor]] = {subnetwork: [] for subnetwork in scalings}
    seen = 0
    for images, labels in batches:
        normalised, labels = normalise(images.to(device), model.config), labels.to(device)
        for subnetwork, counts in correct.items():
            logits = model(normalised, subnetwork)
            top1, top5 = count_correct(logits, labels)
            counts[0] += top1
            counts[1] += top5
            confidence, best = scalings[subnetwork].probabilities(logits).max(dim=1)
            confidences[subnetwork].append(confidence)
            hits[subnetwork].append(best == labels)
        seen += len(labels)
    if seen == 0:
        raise ValueError("no images to measure on")
    return {
        subnetwork: Measured(
            top1 / seen,
            top5 / seen,
            expected_calibration_error(torch.cat(confidences[subnetwork]), torch.cat(hits[subnetwork])),
        )
        for subnetwork, (top1, top5) in correct.items()
    }


def accuracy_table(profile: ProfileTable) -> str:
    """Lay out top-1 in percent with the GFLOPs beside it: a row per keep rate, a column per patch grid."""
    rows = profile.by_subnetwork
    grids = sorted({subnetwork.patch_grid for subnetwork in rows})
    rates = sorted({subnetwork.keep_rate for subnetwork in rows})
    lines = ["keep rate" + "".join(f"{f'grid {grid}':>20}" for grid in grids)]
    for rate in rates:
        cells = [rows.get(SubNetwork(grid, rate)) for grid in grids]
        lines.append(f"{rate:9.4g}" + "".join(f"{_cell(cell):>20}" for cell in cells))
    return "\n".join(lines)


def calibration_summary(profile: ProfileTable) -> str:
    """Say in a line how far the probabilities of a measured profile can be believed."""
    temperatures = [row.temperature for row in profile.rows]
    errors = [row.calibration_error for row in profile.rows if row.calibration_error is not None]
    return (
        f"expected calibration error {100 * min(errors):.2f} to {100 * max(errors):.2f} % "
        f"at temperatures of {min(temperatures):.3f} to {max(temperatures):.3f}"
    )


def _cell(row: SubNetworkProfile | None) -> str:
    if row is None:
        return "-"
    accuracy = "?" if row.top1 is None else f"{100 * row.top1:.2f} %"
    return f"{accuracy} {row.gflops:.4g} G"
