"""Every sub-network on a labelled set: the accuracy table."""

from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from models.data import normalise
from models.profiles import ProfileTable, SubNetworkProfile
from models.flops import count_macs
from models.subnetwork import SubNetwork
from models.supervit import SuperViT


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
