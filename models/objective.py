"""The training step: which four sub-networks it takes, what each of them is asked to match, the update they share."""

import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from models.checkpoint import CheckpointMismatchError, UnreadableCheckpointError, read_weights
from models.subnetwork import SuperViTConfig
from models.supervit import SuperViT


@dataclass(frozen=True, slots=True)
class PairChoice:
    """One grid, trained at keep rate 1 on the labels and at `keep_rate` on what keep rate 1 answered."""

    patch_grid: int
    keep_rate: float


def sample_pairs(config: SuperViTConfig, seed: int, step: int) -> tuple[PairChoice, PairChoice]:
    """Choose the four sub-networks of a step: the largest grid and a random smaller one, each whole and pruned.

    A function of seed and step alone, so every process of a run takes the same ones, and so does a resumed run.
    """
    choice = random.Random(f"{seed}/{step}")
    pruning_rates = config.keep_rates[:-1] or (1.0,)
    smaller_grids = config.patch_grids[:-1] or config.patch_grids
    return (
        PairChoice(config.patch_grids[-1], choice.choice(pruning_rates)),
        PairChoice(choice.choice(smaller_grids), choice.choice(pruning_rates)),
    )


class PairLoss(nn.Module):
    """Two of the four losses of a step (paper, section 3.3): labels for the whole, distillation for the pruned."""

    def __init__(self, model: SuperViT, label_smoothing: float, teacher_weight: float) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.teacher_weight = teacher_weight

    def forward(
        self, images: Tensor, targets: Tensor, taught: Tensor | None, pair: PairChoice
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses of one pair.

        Args:
            images: (B, 3, S, S), normalised.
            targets: (B,) class indices, or (B, classes) probabilities where labels were mixed and smoothed.
            taught: (B, classes), the probabilities that a teacher gives; None without one.
            pair: the grid and its reduced keep rate.

        Returns:
            The classification loss at keep rate 1, and the KL divergence (mean over the batch) of `pair.keep_rate`
            from what keep rate 1 answered, which takes no gradient.
        """
        full, pruned = self.model.forward_pair(images, pair.patch_grid, pair.keep_rate)
        full, pruned = full.float(), pruned.float()
        smoothing = self.label_smoothing if targets.ndim == 1 else 0.0
        classification = functional.cross_entropy(full, targets, label_smoothing=smoothing)
        if taught is not None:
            classification = classification.lerp(_divergence(full, taught), self.teacher_weight)
        return classification, _divergence(pruned, full.detach().softmax(dim=1))


def _divergence(logits: Tensor, probabilities: Tensor) -> Tensor:
    return functional.kl_div(logits.log_softmax(dim=1), probabilities, reduction="batchmean")


class Teacher(nn.Module):
    """A plain timm classifier, frozen, that sees the student's images at its own size and normalisation."""

    def __init__(self, name: str, weights: Path | None, config: SuperViTConfig) -> None:
        """Load timm's `name`.

        Args:
            name: a timm model.
            weights: a state dict for it; None for the weights that timm downloads.
            config: the student, for its classes and the normalisation to undo.

        Raises:
            CheckpointError: the weights cannot be read or downloaded, or are not those of `name` for these classes.
        """
        super().__init__()
        if weights is None:
            self.network = _download(name, config.num_classes)
        else:
            self.network = timm.create_model(name, num_classes=config.num_classes)
            try:
                self.network.load_state_dict(read_weights(weights))
            except RuntimeError as error:
                raise CheckpointMismatchError(f"{weights}: not weights of {name}: {_one_line(error)}") from error
        self.network.requires_grad_(False).eval()
        data = timm.data.resolve_model_data_config(self.network)
        self.side = data["input_size"][-1]
        student_mean, student_std, mean, std = (
            torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std, data["mean"], data["std"])
        )
        self.scale, self.shift = nn.Buffer(student_std / std), nn.Buffer((student_mean - mean) / std)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Answer (B, classes) probabilities for the student's (B, 3, S, S) images."""
        images = images * self.scale + self.shift
        if images.shape[-1] != self.side:
            images = functional.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True)
        logits: Tensor = self.network(images)
        return logits.float().softmax(dim=1)


def _download(name: str, num_classes: int) -> nn.Module:
    try:
        known = timm.get_pretrained_cfg_value(name, "num_classes")
        if known != num_classes:  # timm would put a random head on the weights without a word
            raise CheckpointMismatchError(
                f"{name}: timm's weights know {known} classes and the data {num_classes}; give --teacher-checkpoint"
            )
        network: nn.Module = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:  # no network, no such file on the hub, no weights at all
        raise UnreadableCheckpointError(
            f"{name}: timm's weights cannot be had: {_one_line(error)}; give --teacher-checkpoint"
        ) from error
    return network


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def training_step(
    pair_loss: PairLoss | DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    targets: Tensor,
    taught: Tensor | None,
    pairs: tuple[PairChoice, PairChoice],
    autocast: torch.autocast,
) -> dict[str, float]:
    """Sum the gradients of four sub-networks and take one optimiser step (paper, section 3.3).

    Args:
        pair_loss: computes two of the four losses from one of the two pairs.
        optimizer: of the shared weights.
        images: (B, 3, S, S), normalised, augmented.
        targets: (B,) class indices or (B, classes) probabilities.
        taught: (B, classes) probabilities of a teacher; None without one.
        pairs: the largest grid's, and a smaller grid's.
        autocast: the precision of the forward pass.

    Returns:
        The four losses by name.
    """
    losses: dict[str, float] = {}
    optimizer.zero_grad()
    for name, pair in zip(("largest grid", "smaller grid"), pairs, strict=True):
        # Processes exchange gradients once a step, with the second pair's.
        with _gradients_kept_local(pair_loss) if pair is pairs[0] else nullcontext():
            with autocast:
                whole, pruned = pair_loss(images, targets, taught, pair)
            (whole + pruned).backward()
        losses |= {name: whole.item(), f"{name}, pruned": pruned.item()}
    optimizer.step()
    return losses


def _gradients_kept_local(pair_loss: PairLoss | DistributedDataParallel) -> AbstractContextManager[None]:
    return pair_loss.no_sync() if isinstance(pair_loss, DistributedDataParallel) else nullcontext()
