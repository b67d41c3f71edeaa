"""What an engine is: it owns the device and the weights, and runs one batch at a time."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from models.subnetwork import SubNetwork

# (B, 3, S, S) uint8 images and what to run to (B, classes) float32 logits, both on the CPU.
Run = Callable[[Tensor, SubNetwork], Tensor]


class Engine(Protocol):
    """What runs batches; called from one thread at a time.

    Attributes:
        is_on_gpu: whether a GPU computes, so that what others do on the CPUs slows no batch down.
    """

    is_on_gpu: bool

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        """Map (B, 3, S, S) uint8 images on the CPU to (B, classes) float32 logits on the CPU.

        Raises:
            ValueError: the patch grid was not trained.
        """
        ...

    def warm_up(self) -> None:
        """Run every trained sub-network once, so that the first request pays for no first-time work."""
        ...

    def fitting_images(self) -> int | None:
        """Tell how many images the memory that is free now holds in one batch; None where memory is no bound."""
        ...

    def describe(self) -> str:
        """Name library, device, precision and threads: what latency depends on, and the same at every start."""
        ...
