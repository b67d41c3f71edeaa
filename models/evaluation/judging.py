"""Judge answers to labelled images: whether they are right, how confident they are, and the resulting measures."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.data.datasets import NO_LABEL
from models.data.images import normalise
from models.data.loaders import gather_round_robin
from models.devices import autocast
from models.evaluation.calibration import Scaling, expected_calibration_error
from models.processes import gather
from models.subnetwork import SubNetwork
from models.supervit import SuperViT

# (B, 3, S, S) uint8 images and a sub-network to (B, classes) float32 logits.
Answer = Callable[[Tensor, SubNetwork], Tensor]


@dataclass(frozen=True, slots=True)
class Measured:
    """Accuracy and calibration error of one sub-network, as fractions 0..1."""

    top1: float
    top5: float
    calibration_error: float


def measure_accuracy(
    answer: Answer, batches: Iterable[tuple[Tensor, Tensor]], scalings: Mapping[SubNetwork, Scaling]
) -> dict[SubNetwork, Measured]:
    """Measure top-1, top-5 and the calibration error of each sub-network; arguments and errors as `judge_images`."""
    judged = judge_images(answer, batches, scalings)
    return {subnetwork: summarise(its_answers) for subnetwork, its_answers in judged.items()}


@torch.inference_mode()
def judge_images(
    answer: Answer, batches: Iterable[tuple[Tensor, Tensor]], scalings: Mapping[SubNetwork, Scaling]
) -> dict[SubNetwork, Tensor]:
    """Judge the answer of each sub-network to each image.

    Args:
        answer: function that computes the logits.
        batches: this process's (B, 3, S, S) uint8 images with their (B,) labels, dealt out round-robin; read once.
        scalings: by sub-network.

    Returns:
        In every process, by sub-network, (M, 3) for all images in their order, as `judge` returns; NaN where an image
        has no label.

    Raises:
        ValueError: there are no images.
    """
    answers: dict[SubNetwork, list[Tensor]] = {subnetwork: [] for subnetwork in scalings}
    num_images = 0
    for images, labels in batches:
        for subnetwork, scaling in scalings.items():
            logits = answer(images, subnetwork)
            judged = judge(logits, labels.to(logits.device), scaling)
            judged[labels == NO_LABEL] = math.nan
            answers[subnetwork].append(judged)
        num_images += len(labels)
    if not any(gather(num_images)):
        raise ValueError("no images to measure on")
    return {subnetwork: gather_round_robin(its_answers) for subnetwork, its_answers in answers.items()}


def summarise(judged: Tensor, fitted_on: Collection[int] = ()) -> Measured:
    """Summarise the result of `judge_images` for one sub-network; the calibration error leaves `fitted_on` out."""
    top1, top5, _ = judged.nanmean(dim=0).tolist()
    unseen = all_but(judged, fitted_on)
    is_right, _, confidence = unseen[~unseen[:, 0].isnan()].unbind(dim=1)
    return Measured(top1, top5, expected_calibration_error(confidence, is_right.bool()))


def all_but(judged: Tensor, places: Collection[int]) -> Tensor:
    """Return the rows that are not at `places`."""
    is_kept = torch.ones(len(judged), dtype=torch.bool)
    is_kept[list(places)] = False
    return judged[is_kept]


def make_answer(model: SuperViT) -> Answer:
    """Return an `Answer` that runs a model, in eval mode on its device, in the device's fastest precision."""

    def answer(images: Tensor, subnetwork: SubNetwork) -> Tensor:
        normalised = normalise(images.to(model.cls_token.device), model.config)
        with autocast(normalised.device):
            logits: Tensor = model(normalised, subnetwork)
        return logits.float()

    return answer


def judge(logits: Tensor, labels: Tensor, scaling: Scaling) -> Tensor:
    """Return whether answers are right, and their confidence.

    Args:
        logits: (B, classes).
        labels: (B,) class indices.
        scaling: maps the logits to probabilities.

    Returns:
        (B, 3) float64 on the CPU: whether the top class is the label, whether one of the top five is, and the
        confidence.
    """
    confidence, best = scaling.probabilities(logits).max(dim=1)
    five = logits.topk(min(5, logits.shape[1]), dim=1).indices
    judged = torch.stack([best == labels, (five == labels[:, None]).any(dim=1), confidence], dim=1)
    return judged.cpu().double()
