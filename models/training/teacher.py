"""Teachers: frozen classifiers, timm's or a copy of the student, that a SuperViT learns from besides the labels."""

import copy
import math
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

import models.registered  # noqa: F401 - registers the SuperViTs with timm
from models.checkpoint import check_weights, read_weights
from models.data.images import normalise
from models.devices import autocast
from models.files.checkpoint_errors import CheckpointMismatchError, UnreadableCheckpointError, prefixed_errors
from models.subnetwork import SuperViTConfig
from models.supervit import SuperViT


class Adapter(nn.Module):
    """A timm classifier that takes a SuperViT's images: it resizes and normalises them as its network expects."""

    def __init__(self, network: nn.Module, config: SuperViTConfig, side: int | None) -> None:
        """Wrap `network`.

        Args:
            network: a timm model.
            config: the SuperViT's configuration, for the normalisation to undo.
            side: pixels to resize the images to; None for timm's input size of the network.
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
        """Compute (B, classes) logits for the SuperViT's (B, 3, S, S) images."""
        logits: Tensor = self.network(self.adapt(images))
        return logits

    def label_patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute (B, classes) logits, and (B, classes, h, w) logits for every place of the network's last features."""
        network: Any = self.network  # timm's
        features = network.forward_features(self.adapt(images))
        return network.forward_head(features), _logits_by_place(self.network, features)

    def adapt(self, images: Tensor) -> Tensor:
        """Normalise and resize the SuperViT's (B, 3, S, S) images as the network expects them."""
        images = images * self.scale + self.shift
        if images.shape[-1] != self.side:
            images = functional.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True)
        return images


class Teacher(nn.Module):
    """A trained classifier, frozen."""

    def __init__(self, network: nn.Module, config: SuperViTConfig) -> None:
        """Freeze `network`, which takes the images of a SuperViT with this configuration."""
        super().__init__()
        self.network, self.config = network.requires_grad_(False).eval(), config

    @classmethod
    def of(cls, model: SuperViT) -> "Teacher":
        """Create a teacher from a copy of a SuperViT as it is now; its largest sub-network teaches all sub-networks."""
        return cls(copy.deepcopy(model), model.config)

    @classmethod
    def load(
        cls, name: str, weights: Path | None, side: int | None, config: SuperViTConfig, everywhere: bool = False
    ) -> "Teacher":
        """Load the timm model `name` as a teacher.

        Args:
            name: a timm model.
            weights: a state dict for it; None for the weights that timm downloads.
            side: pixels to resize the images to; None for timm's input size of the model.
            config: the student's configuration, for its classes and the normalisation to undo.
            everywhere: whether the teacher will be asked about every place of an image.

        Raises:
            CheckpointError: the weights cannot be read or downloaded or are not those of `name` for these classes, or
                the network cannot take images of that size or answer for every place of them.
        """
        classes = config.num_classes
        network = _download(name, classes) if weights is None else _create(name, weights, classes)
        adapter = Adapter(network, config, side)
        adapter.to(memory_format=torch.channels_last)  # one and a half times as fast on a CPU
        teacher = cls(adapter, config)
        blank = torch.zeros(1, 3, config.image_side, config.image_side)
        try:
            teacher(blank)
        except (RuntimeError, ValueError, AssertionError) as error:  # of a network that takes images of one size only
            message = f"{name}: does not support images of {adapter.side} pixels; give another --teacher-side"
            raise CheckpointMismatchError(message) from error
        try:
            if everywhere:
                teacher.label_patches(blank)
        except (RuntimeError, ValueError, AttributeError) as error:  # of a network that timm cannot split in two
            message = f"{name}: cannot label every place of an image; leave out --teacher-tokens"
            raise CheckpointMismatchError(message) from error
        return teacher

    @property
    def device(self) -> torch.device:
        """Device on which the teacher runs."""
        return next(self.network.parameters()).device

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Compute (B, classes) probabilities for the student's (B, 3, S, S) images."""
        with autocast(self.device):
            logits: Tensor = self.network(images)
        return logits.float().softmax(dim=1)

    @torch.no_grad()
    def label_patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute probabilities for the student's (B, 3, S, S) images, and for every patch of its largest grid.

        Returns:
            (B, classes) and (B, patches, classes) probabilities, the patches row by row.
        """
        if not isinstance(self.network, Adapter):
            raise TypeError("only a timm network can label every place of an image")
        with autocast(self.device):
            logits, places = self.network.label_patches(images)
        patch_grid = self.config.patch_grids[-1]
        places = functional.interpolate(places.float(), (patch_grid, patch_grid), mode="bilinear", antialias=True)
        return logits.float().softmax(dim=1), places.softmax(dim=1).flatten(2).transpose(1, 2)

    def classify_with_mirror(self, images: Tensor) -> Tensor:
        """Compute (B, classes) probabilities for (B, 3, S, S) uint8 images: means over image and mirror image."""
        images = normalise(images, self.config)
        answers: Tensor = (self(images) + self(images.flip(3))) / 2
        return answers


def _logits_by_place(network: nn.Module, features: Tensor) -> Tensor:
    """Apply a timm classifier's head to each place of its features as if the whole image looked like that place.

    Args:
        network: the classifier.
        features: (B, N, D), (B, D, h, w), or (B, h, w, D) if the network's output format is NHWC.

    Returns:
        (B, classes, h, w) logits.

    Raises:
        ValueError: the patch tokens do not form a square.
    """
    if features.ndim == 3:
        others = getattr(network, "num_prefix_tokens", 0)  # the class token and the like, which a head may read instead
        patches = features[:, others:]
        height = width = math.isqrt(patches.shape[1])
        if height * width != patches.shape[1]:
            raise ValueError(f"{patches.shape[1]} patch tokens do not form a square")
        places = patches.flatten(0, 1)[:, None].expand(-1, 1 + others, -1)
    elif getattr(network, "output_fmt", "NCHW") == "NHWC":
        height, width = features.shape[1:3]
        places = features.flatten(0, 2)[:, None, None]
    else:
        height, width = features.shape[2:]
        places = features.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]
    logits: Tensor = network.forward_head(places)  # type: ignore[operator] # timm's
    return logits.view(len(features), height, width, -1).permute(0, 3, 1, 2)


def _create(name: str, path: Path, num_classes: int) -> nn.Module:
    try:
        network: nn.Module = timm.create_model(name, num_classes=num_classes)
    except (RuntimeError, ValueError) as error:
        raise CheckpointMismatchError(f"{path}: unknown timm model or tag {name}") from error
    weights = read_weights(path)
    with prefixed_errors(f"{path}: its weights do not match {name}"):
        check_weights(weights, network.state_dict())
    network.load_state_dict(weights)
    return network


def _download(name: str, num_classes: int) -> nn.Module:
    try:
        known = timm.get_pretrained_cfg_value(name, "num_classes")
        if known != num_classes:  # timm would silently put a random head on the weights
            raise CheckpointMismatchError(
                f"{name}: timm's weights have {known} classes and the data has {num_classes}; give --teacher-checkpoint"
            )
        network: nn.Module = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:  # no connection, no such file on the hub, no weights at all
        raise UnreadableCheckpointError(
            f"{name}: timm's weights are not available; give --teacher-checkpoint"
        ) from error
    return network
