"""Every sub-network on labelled images: the accuracy table of a checkpoint, and how far its probabilities are right."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from models.checkpoint import Checkpoint
from models.data.datasets import NO_LABEL, ImageSet, Sample
from models.data.images import normalise
from models.data.loaders import gather_in_turn, load_in_turn
from models.devices import autocast
from models.evaluation.calibration import Scaling, expected_calibration_error, fit_scaling
from models.evaluation.hold_out import open_hold_out
from models.processes import Process, gather
from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from models.supervit import SuperViT

Progress = Callable[[DataLoader[Sample]], Iterable[tuple[Tensor, Tensor]]]
# (B, 3, S, S) uint8 images and a sub-network to (B, classes) float32 logits.
Answer = Callable[[Tensor, SubNetwork], Tensor]

# Enough for the two numbers that are fitted, and few enough to keep all their logits over a thousand classes.
CALIBRATION_IMAGES = 5000


@dataclass(frozen=True, slots=True)
class Measured:
    """What one sub-network was found to do: fractions 0..1."""

    top1: float
    top5: float
    calibration_error: float


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
    answer: Answer | None = None,
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
        answer: what computes the logits; the checkpoint's model on the process's device by default.

    Raises:
        DataError: the data set is unusable, or a class folder is none of the checkpoint's classes.
    """
    calibrating, chosen, measuring = open_hold_out(checkpoint, data, max_bad_images, calibration_images)
    answer = answer or answers_of(checkpoint.model.to(process.device))

    def batches(images: ImageSet, places: Sequence[int]) -> Iterable[tuple[Tensor, Tensor]]:
        return progress(load_in_turn(images, places, batch_size, workers, process.rank, process.count))

    profile = checkpoint.profile.with_rates_between(checkpoint.config) if rates_between else checkpoint.profile
    scalings = fit_scalings(answer, batches(calibrating, chosen), profile.by_subnetwork, process.rank, process.count)
    fitted_on = chosen if calibrating is measuring else ()
    measured = measure_accuracy(answer, batches(measuring, range(len(measuring))), scalings, fitted_on)
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
    return Evaluation(ProfileTable(rows), basis)


def fit_scalings(
    answer: Answer,
    batches: Iterable[tuple[Tensor, Tensor]],
    subnetworks: Iterable[SubNetwork],
    rank: int = 0,
    processes: int = 1,
) -> dict[SubNetwork, Scaling]:
    """Find the scaling of each sub-network on images that its weights were not trained on.

    Args:
        answer: what computes the logits.
        batches: this process's (B, 3, S, S) uint8 images with their (B,) labels, dealt out in turn; read once.
        subnetworks: those to calibrate.
        rank: of this process; each fits some of the sub-networks, and all get all scalings.
        processes: how many there are.
    """
    answers: dict[SubNetwork, list[Tensor]] = {subnetwork: [] for subnetwork in subnetworks}
    all_labels = []
    with torch.inference_mode():
        for images, labels in batches:
            for subnetwork, its_answers in answers.items():
                its_answers.append(answer(images, subnetwork).cpu())
            all_labels.append(labels)
    labels = gather_in_turn(all_labels)
    has_label = labels != NO_LABEL
    own = {}
    for number, (subnetwork, its_answers) in enumerate(answers.items()):
        logits = gather_in_turn(its_answers)
        if number % processes == rank:
            own[subnetwork] = fit_scaling(logits[has_label], labels[has_label])
    fitted = {subnetwork: scaling for share in gather(own) for subnetwork, scaling in share.items()}
    return {subnetwork: fitted[subnetwork] for subnetwork in answers}


@torch.inference_mode()
def measure_accuracy(
    answer: Answer,
    batches: Iterable[tuple[Tensor, Tensor]],
    scalings: Mapping[SubNetwork, Scaling],
    fitted_on: Collection[int] = (),
) -> dict[SubNetwork, Measured]:
    """Measure top-1, top-5 and the calibration error of each sub-network.

    Args:
        answer: what computes the logits.
        batches: this process's (B, 3, S, S) uint8 images with their (B,) labels, dealt out in turn; read once.
        scalings: by sub-network.
        fitted_on: places of the images that the scalings were fitted on, which say nothing of the calibration error.

    Returns:
        In every process, what was measured on the images of all processes.

    Raises:
        ValueError: there are no images.
    """
    answers: dict[SubNetwork, list[Tensor]] = {subnetwork: [] for subnetwork in scalings}
    all_labels = []
    for images, labels in batches:
        for subnetwork, scaling in scalings.items():
            logits = answer(images, subnetwork)
            answers[subnetwork].append(judge(logits, labels.to(logits.device), scaling))
        all_labels.append(labels)
    if not any(gather(len(all_labels))):
        raise ValueError("no images to measure on")
    has_label = gather_in_turn(all_labels) != NO_LABEL
    counts_for_error = has_label.clone()
    counts_for_error[list(fitted_on)] = False
    measured = {}
    for subnetwork, its_answers in answers.items():
        judged = gather_in_turn(its_answers)
        top1, top5, _ = judged[has_label].mean(dim=0).tolist()
        is_right, _, confidence = judged[counts_for_error].unbind(dim=1)
        measured[subnetwork] = Measured(top1, top5, expected_calibration_error(confidence, is_right.bool()))
    return measured


def answers_of(model: SuperViT) -> Answer:
    """Let a model, in eval mode on the device where it shall run, answer in the fastest precision of that."""

    def answer(images: Tensor, subnetwork: SubNetwork) -> Tensor:
        normalised = normalise(images.to(model.cls_token.device), model.config)
        with autocast(normalised.device):
            logits: Tensor = model(normalised, subnetwork)
        return logits.float()

    return answer


def judge(logits: Tensor, labels: Tensor, scaling: Scaling) -> Tensor:
    """Tell whether answers are right and how sure of it.

    Args:
        logits: (B, classes).
        labels: (B,) class indices.
        scaling: what makes probabilities of the logits.

    Returns:
        (B, 3) float64 on the CPU: whether the best class is the label, whether one of the best five is, confidence.
    """
    confidence, best = scaling.probabilities(logits).max(dim=1)
    five = logits.topk(min(5, logits.shape[1]), dim=1).indices
    judged = torch.stack([best == labels, (five == labels[:, None]).any(dim=1), confidence], dim=1)
    return judged.cpu().double()


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
