"""The training step: which sub-networks it takes, what each of them is asked to match, the update they share."""

import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from models.mix_token import TokenBox, exchange_tokens, mix_labels
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


def sample_single(config: SuperViTConfig, seed: int, step: int) -> tuple[PairChoice]:
    """Choose the one sub-network of a cheap step: a random grid, whole."""
    grid = random.Random(f"{seed}/{step}").choice(config.patch_grids)
    return (PairChoice(grid, config.keep_rates[-1], None),)


@dataclass(frozen=True, slots=True)
class Targets:
    """What a batch is to be answered with.

    Attributes:
        labels: (B,) class indices, or (B, classes) probabilities where labels were mixed and smoothed.
        taught: (B, classes), the probabilities that a teacher gives; None without one.
        tokens: (B, N - 1, classes), probabilities for every patch token of the largest grid; None where the labels are
            to stand for all of them.
    """

    labels: Tensor
    taught: Tensor | None = None
    tokens: Tensor | None = None


class PairLoss(nn.Module):
    """The losses of a pair (paper, section 3.3): labels for the whole, distillation for the pruned.

    An LV-ViT's patch tokens have labels as well, at the largest grid (token labelling: Jiang et al., NeurIPS 2021).
    """

    def __init__(
        self, model: SuperViT, label_smoothing: float, teacher_weight: float, token_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.teacher_weight = teacher_weight
        self.token_weight = token_weight

    def forward(
        self,
        images: Tensor,
        targets: Targets,
        pair: PairChoice,
        box: TokenBox | None = None,
        example: Tensor | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Compute the losses of one pair.

        Args:
            images: (B, 3, S, S), normalised.
            targets: what they are to be answered with.
            pair: the grid and its keep rates.
            box: whose patch tokens the images exchange; None for none.
            example: (B, classes) probabilities, what the pruned sub-network of an earlier pair of this step learned
                from; None in the first.

        Returns:
            The losses: at the highest keep rate that of the labels; and, where the pair has a lower one, the KL
            divergence (mean over the batch) of that one from its example. And the example, which takes no gradient.
        """
        config = self.model.config
        lower = () if pair.pruned_keep_rate is None else (pair.pruned_keep_rate,)
        tokens = self.model.forward_rates(images, pair.patch_grid, (pair.keep_rate, *lower), box)
        full, *pruned = (self.model.classify(its_tokens).float() for its_tokens in tokens)
        labels = self.spread(targets.labels)
        loss = self.classification_loss(full, labels, targets.taught, box)
        if self.model.aux_head is not None and pair.patch_grid == config.patch_grids[-1]:
            token_logits = self.model.aux_head(tokens[0][:, 1:]).float()
            token_labels = labels[:, None] if targets.tokens is None else targets.tokens
            loss = loss + self.token_weight * _token_loss(token_logits, token_labels, box)
        # An LV-ViT learns from the largest sub-network at every grid, a DeiT from that of the same grid.
        if example is None or config.flavour == "deit":
            example = full.detach().softmax(dim=1)
        return (loss, *(_divergence(answer, example) for answer in pruned)), example

    def spread(self, labels: Tensor) -> Tensor:
        """Turn (B,) class indices into (B, classes) probabilities, smoothed; probabilities are so already."""
        if labels.ndim == 2:
            return labels
        num_classes = self.model.config.num_classes
        certain = functional.one_hot(labels, num_classes).float()
        return certain * (1 - self.label_smoothing) + self.label_smoothing / num_classes

    def classification_loss(
        self, logits: Tensor, labels: Tensor, taught: Tensor | None, box: TokenBox | None
    ) -> Tensor:
        """Compare (B, classes) logits with labels and teacher, both mixed as the tokens of the images are."""
        if box is not None:
            labels, taught = mix_labels(labels, box), None if taught is None else mix_labels(taught, box)
        loss = functional.cross_entropy(logits, labels)
        return loss if taught is None else loss.lerp(_divergence(logits, taught), self.teacher_weight)


def _token_loss(logits: Tensor, labels: Tensor, box: TokenBox | None) -> Tensor:
    """Compare (B, N - 1, classes) logits, exchanged back, with (B, N - 1, classes) labels or (B, 1, classes) ones."""
    if box is not None:
        logits = exchange_tokens(logits, box)
    return -(labels * logits.log_softmax(dim=2)).sum(dim=2).mean()


def _divergence(logits: Tensor, probabilities: Tensor) -> Tensor:
    return functional.kl_div(logits.log_softmax(dim=1), probabilities, reduction="batchmean")


def training_step(
    pair_loss: PairLoss | DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    targets: Targets,
    pairs: tuple[PairChoice, ...],
    autocast: torch.autocast,
    box: TokenBox | None = None,
) -> dict[str, float]:
    """Sum the gradients of all sub-networks of a step and take one optimiser step (paper, section 3.3).

    Args:
        pair_loss: computes the losses of a pair.
        optimizer: of the shared weights.
        images: (B, 3, S, S), normalised, augmented.
        targets: what they are to be answered with.
        pairs: one, or the largest grid's and a smaller grid's.
        autocast: the precision of the forward pass.
        box: whose patch tokens the images exchange in all sub-networks; None for none.

    Returns:
        The losses by name.
    """
    losses: dict[str, float] = {}
    example = None
    optimizer.zero_grad()
    for name, pair in zip(PAIR_NAMES[len(pairs)], pairs, strict=True):
        # Processes exchange gradients once a step, with the last pair's.
        with nullcontext() if pair is pairs[-1] else _gradients_kept_local(pair_loss):
            with autocast:
                parts, example = pair_loss(images, targets, pair, box, example)
            sum(parts).backward()
        losses |= zip((name, f"{name}, pruned"), (part.item() for part in parts), strict=False)
    optimizer.step()
    return losses


def _gradients_kept_local(pair_loss: PairLoss | DistributedDataParallel) -> AbstractContextManager[None]:
    return pair_loss.no_sync() if isinstance(pair_loss, DistributedDataParallel) else nullcontext()
