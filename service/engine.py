"""The engine owns the device and the weights, and runs one batch at a time."""

from typing import Protocol

import torch
from torch import Tensor

from models.data import normalise
from models.devices import resolve_device
from models.subnetwork import SubNetwork
from models.supervit import SuperViT


class Engine(Protocol):
    """What runs batches; called from one thread at a time."""

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        """Map (B, 3, S, S) uint8 images on the CPU to (B, classes) float32 logits on the CPU."""
        ...

    def warm_up(self) -> None:
        """Run every kind of sub-network once, so that the first request pays for no first-time work."""
        ...

    def describe(self) -> str:
        """Name device and precision for the log."""
        ...


class TorchEngine:
    """Eager PyTorch in float32 on a CPU or a GPU, one copy of the weights."""

    def __init__(self, model: SuperViT, device: str) -> None:
        """Move the model to its device.

        Args:
            model: in eval mode.
            device: a torch device, or "auto" for the first GPU where there is one.

        Raises:
            DeviceError: there is no such device here.
        """
        self._device = resolve_device(device)
        self._model = model.to(self._device)

    @torch.inference_mode()
    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        """Map (B, 3, S, S) uint8 images to (B, classes) float32 logits."""
        normalised = normalise(images.to(self._device, non_blocking=True), self._model.config)
        logits: Tensor = self._model(normalised, subnetwork)
        return logits.float().cpu()

    def warm_up(self) -> None:
        """Run every trained sub-network once."""
        config = self._model.config
        images = torch.zeros(1, 3, config.image_side, config.image_side, dtype=torch.uint8)
        for subnetwork in config.subnetworks:
            self.run(images, subnetwork)

    def describe(self) -> str:
        """Name device and precision."""
        return f"torch {torch.__version__} on {self._device}, float32, {torch.get_num_threads()} threads"
