"""What an engine is: it owns the device and the weights, and runs one batch at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from models.subnetwork import SubNetwork

# (B, 3, S, S) uint8 images and what to run to (B, classes) float32 logits, both on the CPU.
Run = Callable[[Tensor, SubNetwork], Tensor]
# What makes later batches of a sub-network and a size fast.
Prepare = Callable[[SubNetwork, int], object]


@dataclass(frozen=True, slots=True)
class Captured:
    """What an engine holds of CUDA graphs.

    Attributes:
        num_graphs: how many.
        held_bytes: memory of the GPU that they take.
    """

    num_graphs: int
    held_bytes: int


class Engine(Protocol):
    """What runs batches; called from one thread at a time.

    Attributes:
        is_on_gpu: whether a GPU computes, so that what others do on the CPUs slows no batch down.
        pads_batches: whether a batch of a size that was not prepared takes as long as one of the next size that was.
    """

    is_on_gpu: bool
    pads_batches: bool

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        """Map (B, 3, S, S) uint8 images on the CPU to (B, classes) float32 logits on the CPU.

        Raises:
            ValueError: the patch grid was not trained.
        """
        ...

    def warm_up(self) -> None:
        """Run every trained sub-network once, so that the first request pays for no first-time work."""
        ...

    def prepare(self, subnetwork: SubNetwork, batch_size: int) -> None:
        """Do what makes later batches of this size fast, beyond running one; not while requests wait."""
        ...

    def captured(self) -> Captured | None:
        """Tell what is held of CUDA graphs; None for an engine that has none."""
        ...

    def fitting_images(self) -> int | None:
        """Tell how many images the memory that is free now holds in one batch; None where memory is no bound."""
        ...

    def describe(self) -> str:
        """Name library, device, precision and threads: what latency depends on, and the same at every start."""
        ...
