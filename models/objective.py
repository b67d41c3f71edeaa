"""The training step: which sub-networks it takes, what each of them is asked to match, the update they share."""

import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from models.subnetwork import SuperViTConfig
from models.supervit import SuperViT

# What a step's pairs are called in a log, by how many there are.
PAIR_NAMES = {1: ("single grid",), 2: ("largest grid", "smaller grid")}


@dataclass(frozen=True, slots=True)
class PairChoice:
    """One grid, trained at its highest keep rate on the labels and at a lower one on what the highest answered.

    Attributes:
        patch_grid: the grid.
        keep_rate: the highest, 1 in a SuperViT.
        pruned_keep_rate: the lower; None for none.
    """

    patch_grid: int
    keep_rate: float
    pruned_keep_rate: float | None


def sample_pairs(config: SuperViTConfig, seed: int, step: int) -> tuple[PairChoice, ...]:
    """Choose the four sub-networks of a step: the largest grid and a random smaller one, each whole and pruned.

    Where the family has one grid or one keep rate, the step has half of them; a family of one is trained as any model.
    A function of seed and step alone, so every process of a run takes the same ones, and so does a resumed run.
    """
    choice = random.Random(f"{seed}/{step}")
    *smaller_grids, largest_grid = config.patch_grids
    *lower_rates, highest_rate = config.keep_rates

    def pair(patch_grid: int) -> PairChoice:
        return PairChoice(patch_grid, highest_rate, choice.choice(lower_rates) if lower_rates else None)

    largest = pair(largest_grid)
    return (largest, pair(choice.choice(smaller_grids))) if smaller_grids else (largest,)


def sample_single(config: SuperViTConfig, seed: int, step: int, *, pruned: bool) -> tuple[PairChoice]:
    """Choose the one sub-network of a cheap step: a random grid, whole or, where `pruned`, at a random keep rate."""
    choice = random.Random(f"{seed}/{step}")
    grid = choice.choice(config.patch_grids)
    return (PairChoice(grid, choice.choice(config.keep_rates) if pruned else config.keep_rates[-1], None),)


class PairLoss(nn.Module):
    """The losses of a pair (paper, section 3.3): labels for the whole, distillation for the pruned."""

    def __init__(self, model: SuperViT, label_smoothing: float, teacher_weight: float) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.teacher_weight = teacher_weight

    def forward(self, images: Tensor, targets: Tensor, taught: Tensor | None, pair: PairChoice) -> tuple[Tensor, ...]:
        """Compute the losses of one pair.

        Args:
            images: (B, 3, S, S), normalised.
            targets: (B,) class indices, or (B, classes) probabilities where labels were mixed and smoothed.
            taught: (B, classes), the probabilities that a teacher gives; None without one.
            pair: the grid and its keep rates.

        Returns:
            The classification loss at the highest keep rate; and, where the pair has a lower one, the KL divergence
            (mean over the batch) of that one from what the highest answered, which takes no gradient.
        """
        lower = () if pair.pruned_keep_rate is None else (pair.pruned_keep_rate,)
        logits = self.model.forward_rates(images, pair.patch_grid, (pair.keep_rate, *lower))
        full, *pruned = (answer.float() for answer in logits)
        smoothing = self.label_smoothing if targets.ndim == 1 else 0.0
        classification = functional.cross_entropy(full, targets, label_smoothing=smoothing)
        if taught is not None:
            classification = classification.lerp(_divergence(full, taught), self.teacher_weight)
        return classification, *(_divergence(answer, full.detach().softmax(dim=1)) for answer in pruned)


def _divergence(logits: Tensor, probabilities: Tensor) -> Tensor:
    return functional.kl_div(logits.log_softmax(dim=1), probabilities, reduction="batchmean")


def training_step(
    pair_loss: PairLoss | DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    targets: Tensor,
    taught: Tensor | None,
    pairs: tuple[PairChoice, ...],
    autocast: torch.autocast,
    scaler: torch.amp.GradScaler | None = None,
    clip_grad: float | None = None,
    place: tuple[int, int] = (1, 1),
) -> dict[str, float]:
    """Sum the gradients of all sub-networks and, after the last batch of a step, let the optimiser take it.

    The step is the paper's (section 3.3); several batches give the gradient of one that is as large as they together.

    Args:
        pair_loss: computes the losses of a pair.
        optimizer: of the shared weights.
        images: (B, 3, S, S), normalised, augmented.
        targets: (B,) class indices or (B, classes) probabilities.
        taught: (B, classes) probabilities of a teacher; None without one.
        pairs: one, or the largest grid's and a smaller grid's.
        autocast: the precision of the forward pass.
        scaler: keeps the gradients of float16 in its range; None in other precisions.
        clip_grad: the norm that a longer gradient of a step is scaled down to; None for any length.
        place: number of this batch, from 1, and how many make the step.

    Returns:
        The losses of this batch by name.
    """
    losses: dict[str, float] = {}
    number, count = place
    if number == 1:
        optimizer.zero_grad()
    for name, pair in zip(PAIR_NAMES[len(pairs)], pairs, strict=True):
        # Processes exchange gradients once a step, with the last pair's of the last batch.
        with nullcontext() if number == count and pair is pairs[-1] else _gradients_kept_local(pair_loss):
            with autocast:
                parts = pair_loss(images, targets, taught, pair)
            loss = torch.stack(parts).sum() / count
            (scaler.scale(loss) if scaler else loss).backward()
        losses |= zip((name, f"{name}, pruned"), (part.item() for part in parts), strict=False)
    if number == count:
        _update(optimizer, scaler, clip_grad)
    return losses


def _update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, clip_grad: float | None) -> None:
    if scaler:
        scaler.unscale_(optimizer)
    if clip_grad is not None:
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        nn.utils.clip_grad_norm_(parameters, clip_grad)
    if scaler:
        scaler.step(optimizer)  # nothing where a gradient overflowed
        scaler.update()  # a smaller scale after that, a larger one after long without
    else:
        optimizer.step()


def _gradients_kept_local(pair_loss: PairLoss | DistributedDataParallel) -> AbstractContextManager[None]:
    return pair_loss.no_sync() if isinstance(pair_loss, DistributedDataParallel) else nullcontext()
