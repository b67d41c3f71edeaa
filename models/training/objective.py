"""The training step: which sub-networks it trains, the target of each, and the update that they share."""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from models.mix_token import TokenBox, TokenExchange, exchange_tokens, mix_labels
from models.subnetwork import SuperViTConfig
from models.supervit import SuperViT

# Names of a step's pairs in the log, by the number of pairs.
PAIR_NAMES = {1: ("single grid",), 2: ("largest grid", "smaller grid")}


@dataclass(frozen=True, slots=True)
class PairChoice:
    """One grid, trained on the labels at its highest keep rate and by distillation at a lower one.

    Attributes:
        patch_grid: the grid.
        keep_rate: the highest keep rate, 1 in a SuperViT.
        pruned_keep_rate: the lower keep rate; None for none.
    """

    patch_grid: int
    keep_rate: float
    pruned_keep_rate: float | None


def sample_pairs(config: SuperViTConfig, seed: int, step: int) -> tuple[PairChoice, ...]:
    """Choose the four sub-networks of a step: the largest grid and a random smaller one, each whole and pruned.

    If the family has one grid or one keep rate, the step has half of them; a family of one is trained like any model.
    The choice depends on seed and step alone, so it is the same in every process of a run and in a resumed run.
    """
    choice = random.Random(f"{seed}/{step}")
    *smaller_grids, largest_grid = config.patch_grids
    *lower_rates, highest_rate = config.keep_rates

    def pair(patch_grid: int) -> PairChoice:
        return PairChoice(patch_grid, highest_rate, choice.choice(lower_rates) if lower_rates else None)

    largest = pair(largest_grid)
    return (largest, pair(choice.choice(smaller_grids))) if smaller_grids else (largest,)


def sample_single(config: SuperViTConfig, seed: int, step: int, *, pruned: bool) -> tuple[PairChoice]:
    """Choose the one sub-network of a cheap step: a random grid, unpruned or, if `pruned`, at a random keep rate."""
    choice = random.Random(f"{seed}/{step}")
    grid = choice.choice(config.patch_grids)
    return (PairChoice(grid, choice.choice(config.keep_rates) if pruned else config.keep_rates[-1], None),)


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets of a batch.

    Attributes:
        labels: (B,) class indices, or (B, classes) probabilities if labels were mixed and smoothed.
        teacher_probs: (B, classes), the probabilities that a teacher gives; None without one.
        tokens: (B, N - 1, classes), probabilities for every patch token of the largest grid; None if each image's label
            applies to all its tokens.
    """

    labels: Tensor
    teacher_probs: Tensor | None = None
    tokens: Tensor | None = None


class PairLoss(nn.Module):
    """The losses of a pair (paper, section 3.3): labels at the highest keep rate, distillation at the lower one.

    The patch tokens of an LV-ViT's largest sub-network have labels as well (Jiang et al., NeurIPS 2021).
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
        exchange: TokenExchange | None = None,
        example: Tensor | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Compute the losses of one pair.

        Args:
            images: (B, 3, S, S), normalised.
            targets: the targets of these images.
            pair: the grid and its keep rates.
            exchange: the patch tokens of the pair's grid that the images exchange; None for none.
            example: (B, classes) probabilities from which the pruned sub-network of an earlier pair of this step was
                distilled; None for the first pair.

        Returns:
            The losses: at the highest keep rate the loss on the labels and, if the pair has a lower keep rate, the KL
            divergence (mean over the batch) between its output and the example. And the example, without a gradient.
        """
        config = self.model.config
        lower = () if pair.pruned_keep_rate is None else (pair.pruned_keep_rate,)
        tokens = self.model.forward_rates(images, pair.patch_grid, (pair.keep_rate, *lower), exchange)
        full, *pruned = (self.model.classify(its_tokens).float() for its_tokens in tokens)
        labels = self.spread(targets.labels)
        loss = self.classification_loss(full, labels, targets.teacher_probs, exchange)
        is_largest = (pair.patch_grid, pair.keep_rate) == (config.patch_grids[-1], 1)
        of_patches = self.model.classify_patches(tokens[0]) if is_largest else None
        if of_patches is not None:
            token_labels = labels[:, None] if targets.tokens is None else targets.tokens
            loss = loss + self.token_weight * _token_loss(of_patches.float(), token_labels, exchange)
        # An LV-ViT is distilled from the largest sub-network at every grid, a DeiT from the largest of the same grid.
        if example is None or config.flavour == "deit":
            example = full.detach().softmax(dim=1)
        return (loss, *(_divergence(answer, example) for answer in pruned)), example

    def spread(self, labels: Tensor) -> Tensor:
        """Turn (B,) class indices into smoothed (B, classes) probabilities; return probabilities unchanged."""
        if labels.ndim == 2:
            return labels
        num_classes = self.model.config.num_classes
        certain = functional.one_hot(labels, num_classes).float()
        return certain * (1 - self.label_smoothing) + self.label_smoothing / num_classes

    def classification_loss(
        self, logits: Tensor, labels: Tensor, teacher_probs: Tensor | None, exchange: TokenExchange | None
    ) -> Tensor:
        """Compute the loss of (B, classes) logits on labels and teacher, both mixed as the tokens of the images are."""
        if exchange is not None:
            labels, teacher_probs = (
                mix_labels(labels, exchange),
                None if teacher_probs is None else mix_labels(teacher_probs, exchange),
            )
        loss = functional.cross_entropy(logits, labels)
        return loss if teacher_probs is None else loss.lerp(_divergence(logits, teacher_probs), self.teacher_weight)


def _token_loss(logits: Tensor, labels: Tensor, exchange: TokenExchange | None) -> Tensor:
    """Compute the loss of (B, N - 1, classes) logits, exchanged back, on labels of that shape or (B, 1, classes)."""
    if exchange is not None:
        logits = exchange_tokens(logits, exchange)
    return -(labels * logits.log_softmax(dim=2)).sum(dim=2).mean()


def _divergence(logits: Tensor, probabilities: Tensor) -> Tensor:
    return functional.kl_div(logits.log_softmax(dim=1), probabilities, reduction="batchmean")


@dataclass(frozen=True, slots=True)
class Learner:
    """What all steps of a run share.

    Attributes:
        pair_loss: computes the losses of a pair.
        optimizer: the optimiser of the shared weights.
        autocast: the precision of the forward pass.
        scaler: keeps float16 gradients in range; None in other precisions.
        clip_grad: the norm that a larger gradient of a step is scaled down to; None for no limit.
    """

    pair_loss: PairLoss | DistributedDataParallel
    optimizer: torch.optim.Optimizer
    autocast: torch.autocast
    scaler: torch.amp.GradScaler | None = None
    clip_grad: float | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One of the batches whose gradients a step sums.

    Attributes:
        images: (B, 3, S, S), normalised, augmented.
        targets: the targets of these images.
        pairs: one pair, or the largest grid's and a smaller grid's.
        box: the box whose patch tokens the images exchange in all sub-networks; None for none.
        number: number of this batch in the step, from 1.
        count: number of batches in the step.
    """

    images: Tensor
    targets: Targets
    pairs: tuple[PairChoice, ...]
    box: TokenBox | None = None
    number: int = 1
    count: int = 1

    @property
    def is_last(self) -> bool:
        """Whether the step ends with this batch."""
        return self.number == self.count


Step = Callable[[Learner, Batch], dict[str, float]]


def training_step(learner: Learner, batch: Batch) -> dict[str, float]:
    """Sum the gradients of all sub-networks and, after the last batch of a step, update the weights.

    The step is the paper's (section 3.3). Several batches give the gradient of one batch as large as all of them.

    Returns:
        The losses of this batch by name.
    """
    losses: dict[str, Tensor] = {}
    example = None
    if batch.number == 1:
        learner.optimizer.zero_grad()
    for name, pair in zip(PAIR_NAMES[len(batch.pairs)], batch.pairs, strict=True):
        exchange = batch.box and batch.box.exchange_on(pair.patch_grid, batch.images.device)
        # Processes exchange gradients once per step, in the backward pass of the last batch's last pair.
        is_end = batch.is_last and pair is batch.pairs[-1]
        with nullcontext() if is_end else _gradients_kept_local(learner.pair_loss):
            with learner.autocast:
                parts, example = learner.pair_loss(batch.images, batch.targets, pair, exchange, example)
            loss = torch.stack(parts).sum() / batch.count
            (learner.scaler.scale(loss) if learner.scaler else loss).backward()  # type: ignore[no-untyped-call] # torch's
        losses |= zip((name, f"{name}, pruned"), (part.detach() for part in parts), strict=False)
    if batch.is_last:
        _update(learner.optimizer, learner.scaler, learner.clip_grad)
    # Read together and last: the CPU waits for a GPU once per batch, with all of the batch's work already queued.
    return dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))


def _update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, clip_grad: float | None) -> None:
    if scaler:
        scaler.unscale_(optimizer)
    if clip_grad is not None:
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        nn.utils.clip_grad_norm_(parameters, clip_grad)
    if scaler:
        scaler.step(optimizer)  # skipped if a gradient overflowed
        scaler.update()  # lowers the scale after an overflow, raises it after a long time without one
    else:
        optimizer.step()


def _gradients_kept_local(pair_loss: PairLoss | DistributedDataParallel) -> AbstractContextManager[None]:
    return pair_loss.no_sync() if isinstance(pair_loss, DistributedDataParallel) else nullcontext()
