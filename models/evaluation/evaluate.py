"""Evaluate every sub-network on labelled images: the accuracy table of a checkpoint, and its calibration."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from models.checkpoint import Checkpoint
from models.data.datasets import NO_LABEL, ImageSet, Sample
from models.data.loaders import gather_round_robin, load_round_robin
from models.evaluation.calibration import Scaling, fit_scaling
from models.evaluation.cascades import choose_cascades, measure_cascade
from models.evaluation.hold_out import open_hold_out
from models.evaluation.judging import Answer, all_but, judge_images, make_answer, summarise
from models.processes import ALONE, Process, gather
from models.profiles import ProfileTable
from models.subnetwork import SubNetwork

Progress = Callable[[DataLoader[Sample]], Iterable[tuple[Tensor, Tensor]]]

# Enough to fit the two numbers of a scaling, and few enough to keep all their logits over a thousand classes in memory.
CALIBRATION_IMAGES = 5000


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        profile: the checkpoint's profile, with accuracies and scalings.
        basis: a sentence on which images the scalings and the calibration error come from.
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
    answer: Answer | None = None,
) -> Evaluation:
    """Fit the scaling of every sub-network on val/ and measure it on test/, in the device's fastest precision.

    Where only one of the two folders exists, accuracy is measured on all its images, the scaling is fitted on at most
    half of each class, and the calibration error is measured on the rest. Several processes share the images and find
    the same results as one.

    Args:
        checkpoint: the weights; its model is moved to the process's device.
        data: folder with val/, test/ or both, of class folders.
        batch_size: images per batch.
        workers: processes that decode images for this one.
        max_bad_images: fraction of the images of a folder that may be unreadable; these are skipped.
        progress: wraps the batches to show the progress.
        process: rank and device of this process, and the number of processes.
        rates_between: whether to add keep rates between those of the checkpoint's profile.
        calibration_images: upper limit of the images that scalings are fitted on.
        answer: function that computes the logits; by default, the checkpoint's model on the process's device.

    Raises:
        DataError: the data set is unusable, or a class folder is not one of the checkpoint's classes.
    """
    calibrating, chosen, measuring = open_hold_out(checkpoint, data, max_bad_images, calibration_images)
    answer = answer or make_answer(checkpoint.model.to(process.device))

    def batches(images: ImageSet, places: Sequence[int]) -> Iterable[tuple[Tensor, Tensor]]:
        return progress(load_round_robin(images, places, batch_size, workers, process))

    profile = checkpoint.profile.with_interpolated_rates(checkpoint.config) if rates_between else checkpoint.profile
    scalings, confidences = fit_scalings(answer, batches(calibrating, chosen), profile.by_subnetwork, process)
    chosen_cascades = choose_cascades([row for row in profile.rows if row.is_trained], confidences)
    fitted_on = chosen if calibrating is measuring else ()
    judged = judge_images(answer, batches(measuring, range(len(measuring))), scalings)
    measured = {subnetwork: summarise(its_answers, fitted_on) for subnetwork, its_answers in judged.items()}
    unseen = {subnetwork: all_but(its_answers, fitted_on) for subnetwork, its_answers in judged.items()}
    cascades = tuple(measure_cascade(one, unseen, measured[one.first].top1) for one in chosen_cascades)
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


def fit_scalings(
    answer: Answer,
    batches: Iterable[tuple[Tensor, Tensor]],
    subnetworks: Iterable[SubNetwork],
    process: Process = ALONE,
) -> tuple[dict[SubNetwork, Scaling], dict[SubNetwork, Tensor]]:
    """Fit the scaling of each sub-network on images that its weights were not trained on.

    Args:
        answer: function that computes the logits.
        batches: this process's (B, 3, S, S) uint8 images with their (B,) labels, dealt out round-robin; read once.
        subnetworks: the sub-networks to calibrate.
        process: this process; each process fits some of the sub-networks, and all get all scalings.

    Returns:
        By sub-network, the scalings, and the (M,) calibrated probabilities of its answers.
    """
    answers: dict[SubNetwork, list[Tensor]] = {subnetwork: [] for subnetwork in subnetworks}
    all_labels = []
    with torch.inference_mode():
        for images, labels in batches:
            for subnetwork, its_answers in answers.items():
                its_answers.append(answer(images, subnetwork).cpu())
            all_labels.append(labels)
    labels = gather_round_robin(all_labels)
    has_label = labels != NO_LABEL
    own = {}
    for number, (subnetwork, its_answers) in enumerate(answers.items()):
        logits = gather_round_robin(its_answers)
        if number % process.count == process.rank:
            scaling = fit_scaling(logits[has_label], labels[has_label])
            own[subnetwork] = scaling, scaling.probabilities(logits[has_label].double()).max(dim=1).values
    fitted = {subnetwork: found for share in gather(own) for subnetwork, found in share.items()}
    return {each: fitted[each][0] for each in answers}, {each: fitted[each][1] for each in answers}
