"""Every sub-network on labelled images: the accuracy table of a checkpoint, and how far its probabilities are right."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader

from models.checkpoint import Checkpoint
from models.data.datasets import (
    NO_LABEL,
    DataError,
    ImageSet,
    Sample,
    difference,
    list_classes,
    open_folder,
    stratified_order,
)
from models.data.images import evaluation_transform, normalise
from models.data.loaders import gather_in_turn, load_in_turn
from models.evaluation.calibration import Scaling, fit_scaling
from models.evaluation.cascades import choose_cascades, measure_cascade
from models.evaluation.judging import all_but, judge_images, logits_of, summarise
from models.processes import Process, gather
from models.profiles import ProfileTable
from models.subnetwork import SubNetwork
from models.supervit import SuperViT

Progress = Callable[[DataLoader[Sample]], Iterable[tuple[Tensor, Tensor]]]

# Enough for the two numbers that are fitted, and few enough to keep all their logits over a thousand classes.
CALIBRATION_IMAGES = 5000


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        profile: of the checkpoint, with accuracies and scalings.
        basis: in a sentence, which images the scalings and the calibration error come from.
    """

    profile: ProfileTable
    basis: str


def evaluate(
    checkpoint: Checkpoint,
    data: Path,
    *,
    batch_size: int,
    workers: int,
    max_bad_images: float,
    progress: Progress,
    process: Process,
    rates_between: bool = False,
    calibration_images: int = CALIBRATION_IMAGES,
) -> Evaluation:
    """Fit the scaling of every sub-network on val/ and measure it on test/, in the device's fastest precision.

    Where there is only one of the two folders, accuracy is that of all its images, while the scaling is fitted on one
    half of each class, and the calibration error that of the rest. Several processes share the images out and find
    what one would.

    Args:
        checkpoint: the weights; its model is moved to the process's device.
        data: folder with val/, test/ or both, of class folders.
        batch_size: images per batch.
        workers: processes that decode images for this one.
        max_bad_images: fraction of the images of a folder that may be unreadable and are passed over.
        progress: wraps the batches to show how far the work is.
        process: which of the processes this is, and its device.
        rates_between: whether to add keep rates between those of the checkpoint's profile.
        calibration_images: most that scalings are fitted on.

    Raises:
        DataError: the data set is unusable, or a class folder is none of the checkpoint's classes.
    """
    folders = [folder for folder in (data / "val", data / "test") if folder.is_dir()]
    if not folders:
        raise DataError(f"{data}: holds neither val/ nor test/")
    sets = [_open_labelled(checkpoint, folder, max_bad_images) for folder in folders]
    calibrating, measuring = sets[0], sets[-1]
    chosen = choose_for_calibration(calibrating, calibration_images, is_measured_too=calibrating is measuring)
    model = checkpoint.model.to(process.device)

    def batches(images: ImageSet, places: Sequence[int]) -> Iterable[tuple[Tensor, Tensor]]:
        return progress(load_in_turn(images, places, batch_size, workers, process.rank, process.count))

    profile = checkpoint.profile.with_rates_between(checkpoint.config) if rates_between else checkpoint.profile
    scalings, confidences = fit_scalings(
        model, batches(calibrating, chosen), profile.by_subnetwork, process.rank, process.count
    )
    chosen_cascades = choose_cascades([row for row in profile.rows if row.is_trained], confidences)
    fitted_on = chosen if calibrating is measuring else ()
    judged = judge_images(model, batches(measuring, range(len(measuring))), scalings)
    measured = {subnetwork: summarise(its_answers, fitted_on) for subnetwork, its_answers in judged.items()}
    unseen = {subnetwork: all_but(its_answers, fitted_on) for subnetwork, its_answers in judged.items()}
    cascades = tuple(measure_cascade(cascade, unseen) for cascade in chosen_cascades)
    rows = tuple(
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
    num_fitted = int((~calibrating.is_bad[list(chosen)]).sum())
    num_measured = int((~measuring.is_bad).sum())
    error_from = (
        f"the other {num_measured - num_fitted}" if fitted_on else f"the {num_measured} of {measuring.folder.name}/"
    )
    basis = (
        f"scalings fitted on {num_fitted} images of {calibrating.folder.name}/, calibration error from {error_from}, "
        f"accuracy from all {num_measured} of {measuring.folder.name}/"
    )
    return Evaluation(ProfileTable(rows, cascades), basis)


def _open_labelled(checkpoint: Checkpoint, folder: Path, max_bad_images: float) -> ImageSet:
    """Open the images of a folder with the checkpoint's labels."""
    indices = label_indices(folder, list_classes(folder), checkpoint.class_names)
    images = open_folder(folder, evaluation_transform(checkpoint.config), max_bad_images)
    images.report_skipped_files()
    images.files = [(path, indices[label]) for path, label in images.files]
    return images


def choose_for_calibration(images: ImageSet, limit: int, *, is_measured_too: bool) -> list[int]:
    """Choose the images to fit scalings on, the same part of every class; half at most, if the rest is measured.

    Raises:
        DataError: there is only one image, which leaves none to measure.
    """
    order = stratified_order([label for _, label in images.files], seed=0)
    most = len(order) // 2 if is_measured_too else len(order)
    if most == 0:
        raise DataError(f"{images.folder}: a single image cannot be both calibrated and measured on")
    return sorted(order[: min(most, limit)])


def label_indices(folder: Path, folder_names: Sequence[str], class_names: tuple[str, ...]) -> list[int]:
    """Find the logit of each class folder, by the class name or, for ImageNet, by its WordNet number.

    Some classes may have no folder.

    Raises:
        DataError: a folder is no class of the checkpoint.
    """
    indices = {name: index for index, name in enumerate(class_names)}
    imagenet = ImageNetInfo()
    if class_names == tuple(imagenet.label_descriptions()):
        indices |= {name: index for index, name in enumerate(imagenet.label_names())}
    if any(name not in indices for name in folder_names):
        found = [class_names[indices[name]] if name in indices else name for name in folder_names]
        differences = difference(class_names, found)
        raise DataError(f"{folder}: its class folders differ from the checkpoint's classes: {differences}")
    return [indices[name] for name in folder_names]


def fit_scalings(
    model: SuperViT,
    batches: Iterable[tuple[Tensor, Tensor]],
    subnetworks: Iterable[SubNetwork],
    rank: int = 0,
    processes: int = 1,
) -> tuple[dict[SubNetwork, Scaling], dict[SubNetwork, Tensor]]:
    """Find the scaling of each sub-network on images that its weights were not trained on.

    Args:
        model: in eval mode, on the device where it shall run.
        batches: this process's (B, 3, S, S) uint8 images with their (B,) labels, dealt out in turn; read once.
        subnetworks: those to calibrate.
        rank: of this process; each fits some of the sub-networks, and all get all scalings.
        processes: how many there are.

    Returns:
        By sub-network, the scalings, and the (M,) probabilities that each then gives to its answers.
    """
    answers: dict[SubNetwork, list[Tensor]] = {subnetwork: [] for subnetwork in subnetworks}
    all_labels = []
    with torch.inference_mode():
        for images, labels in batches:
            normalised = normalise(images.to(model.cls_token.device), model.config)
            for subnetwork, its_answers in answers.items():
                its_answers.append(logits_of(model, normalised, subnetwork).cpu())
            all_labels.append(labels)
    labels = gather_in_turn(all_labels)
    has_label = labels != NO_LABEL
    own = {}
    for number, (subnetwork, its_answers) in enumerate(answers.items()):
        logits = gather_in_turn(its_answers)
        if number % processes == rank:
            scaling = fit_scaling(logits[has_label], labels[has_label])
            own[subnetwork] = scaling, scaling.probabilities(logits[has_label].double()).max(dim=1).values
    fitted = {subnetwork: found for share in gather(own) for subnetwork, found in share.items()}
    return {each: fitted[each][0] for each in answers}, {each: fitted[each][1] for each in answers}
