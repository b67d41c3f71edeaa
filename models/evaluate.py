"""Every sub-network on a labelled set: the accuracy table of a checkpoint."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader

from models.checkpoint import Checkpoint
from models.data import DataError, Sample, SampleLoader, evaluation_transform, normalise, open_folder
from models.devices import resolve_device
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from models.supervit import SuperViT

Progress = Callable[[DataLoader[Sample]], Iterable[tuple[Tensor, Tensor]]]


def evaluate(
    checkpoint: Checkpoint, data: Path, *, batch_size: int, workers: int, progress: Progress, device: str = "auto"
) -> ProfileTable:
    """Measure top-1 and top-5 of every sub-network, in float32.

    Args:
        checkpoint: the weights; its model is moved to `device`.
        data: folder with val/ or, where there is none, test/, of class folders.
        batch_size: images per batch.
        workers: processes that decode images.
        progress: wraps the batches to show how far the work is.
        device: name of the device to run on, as `resolve_device` understands it.

    Returns:
        The checkpoint's profile with the measured accuracies.

    Raises:
        DataError: the data set is unusable, or a class folder is none of the checkpoint's classes.
        DeviceError: the device cannot be used.
    """
    split = next((folder for folder in (data / "val", data / "test") if folder.is_dir()), None)
    if split is None:
        raise DataError(f"{data}: holds neither val/ nor test/")
    images = open_folder(split, evaluation_transform(checkpoint.config))
    labels = label_indices(split, images.classes, checkpoint.class_names)
    images.target_transform = labels.__getitem__
    loader = SampleLoader(images, batch_size, num_workers=workers)
    subnetworks = [row.subnetwork for row in checkpoint.profile.rows]
    measured = measure_accuracy(checkpoint.model.to(resolve_device(device)), progress(loader), subnetworks)
    return ProfileTable(
        tuple(
            replace(row, top1=measured[row.subnetwork][0], top5=measured[row.subnetwork][1])
            for row in checkpoint.profile.rows
        )
    )


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


@torch.inference_mode()
def measure_accuracy(
    model: SuperViT, batches: Iterable[tuple[Tensor, Tensor]], subnetworks: Iterable[SubNetwork]
) -> dict[SubNetwork, tuple[float, float]]:
    """Measure top-1 and top-5 of each sub-network.

    Args:
        model: in eval mode, on the device where it shall run.
        batches: (B, 3, S, S) uint8 images with their (B,) labels; read once.
        subnetworks: those to measure.

    Returns:
        Fractions 0..1 by sub-network.

    Raises:
        ValueError: there are no images.
    """
    device = model.cls_token.device
    correct = {subnetwork: [0, 0] for subnetwork in subnetworks}
    seen = 0
    for images, labels in batches:
        normalised, labels = normalise(images.to(device), model.config), labels.to(device)
        for subnetwork, counts in correct.items():
            top1, top5 = count_correct(model(normalised, subnetwork), labels)
            counts[0] += top1
            counts[1] += top5
        seen += len(labels)
    if seen == 0:
        raise ValueError("no images to measure on")
    return {subnetwork: (top1 / seen, top5 / seen) for subnetwork, (top1, top5) in correct.items()}


def accuracy_table(profile: ProfileTable) -> str:
    """Lay out top-1 in percent as the paper does: a row per patch grid, a column per keep rate, GFLOPs beside it."""
    rows = profile.by_subnetwork
    grids = sorted({subnetwork.patch_grid for subnetwork in rows})
    rates = sorted({subnetwork.keep_rate for subnetwork in rows})
    lines = ["grid" + "".join(f"{f'keep {rate:g}':>20}" for rate in rates)]
    for grid in grids:
        cells = [rows.get(SubNetwork(grid, rate)) for rate in rates]
        lines.append(f"{grid:4d}" + "".join(f"{_cell(cell):>20}" for cell in cells))
    return "\n".join(lines)


def _cell(row: SubNetworkProfile | None) -> str:
    if row is None:
        return "-"
    accuracy = "?" if row.top1 is None else f"{100 * row.top1:.2f} %"
    return f"{accuracy} {row.gflops:.4g} G"
