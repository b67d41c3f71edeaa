"""Teachers: plain timm classifiers whose answers a SuperViT learns from beside the labels."""

from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.checkpoint import CheckpointMismatchError, UnreadableCheckpointError, read_weights
from models.devices import autocast
from models.images import normalise
from models.subnetwork import SuperViTConfig


class Adapter(nn.Module):
    """A timm classifier that takes a SuperViT's images: its own size and normalisation are seen to inside."""

    def __init__(self, network: nn.Module, config: SuperViTConfig, side: int | None) -> None:
        """Wrap `network`.

        Args:
            network: a timm model.
            config: the SuperViT, for the normalisation to undo.
            side: pixels to resize the images to; None for what timm says of the network.
        """
        super().__init__()
        self.network, self.config = network, config
        data = timm.data.resolve_model_data_config(network)
        self.side = side or data["input_size"][-1]
        student_mean, student_std, mean, std = (
            torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std, data["mean"], data["std"])
        )
        self.scale, self.shift = nn.Buffer(student_std / std), nn.Buffer((student_mean - mean) / std)

    def forward(self, images: Tensor) -> Tensor:
        """Answer (B, classes) logits for the SuperViT's (B, 3, S, S) images."""
        images = images * self.scale + self.shift
        if images.shape[-1] != self.side:
            images = functional.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True)
        logits: Tensor = self.network(images)
        return logits


class Teacher(nn.Module):
    """A trained timm classifier, frozen."""

    def __init__(self, name: str, weights: Path | None, side: int | None, config: SuperViTConfig) -> None:
        """Load timm's `name`.

        Args:
            name: a timm model.
            weights: a state dict for it; None for the weights that timm downloads.
            side: pixels to resize the images to; None for what timm says of the model.
            config: the student, for its classes and the normalisation to undo.

        Raises:
            CheckpointError: the weights cannot be read or downloaded, are not those of `name` for these classes, or
                cannot be used on images of that size.
        """
        super().__init__()
        if weights is None:
            network = _download(name, config.num_classes)
        else:
            try:
                network = timm.create_model(name, num_classes=config.num_classes)
                network.load_state_dict(read_weights(weights))
            except (RuntimeError, ValueError) as error:  # a tag that timm does not know, or names that do not fit
                raise CheckpointMismatchError(f"{weights}: not weights of {name}: {_one_line(error)}") from error
        self.network = Adapter(network.requires_grad_(False).eval(), config, side)
        self.network.to(memory_format=torch.channels_last)  # half as fast again, on a CPU
        self.config = config
        try:
            self(torch.zeros(1, 3, config.image_side, config.image_side))
        except (RuntimeError, ValueError, AssertionError) as error:  # as of a network for images of one size
            message = f"{name}: cannot look at images of {self.network.side} pixels: {_one_line(error)}"
            raise CheckpointMismatchError(message) from error

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.network.scale.device

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Answer (B, classes) probabilities for the student's (B, 3, S, S) images."""
        with autocast(self.device):
            logits: Tensor = self.network(images)
        return logits.float().softmax(dim=1)

    def answer_both_ways(self, images: Tensor) -> Tensor:
        """Answer (B, classes) probabilities for (B, 3, S, S) uint8 images: means over each and its mirror image."""
        images = normalise(images, self.config)
        answers: Tensor = (self(images) + self(images.flip(3))) / 2
        return answers


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
