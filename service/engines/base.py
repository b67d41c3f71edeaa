"""The protocol of an engine: it owns the device and the weights, and runs one batch at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from models.subnetwork import SubNetwork

# Maps (B, 3, S, S) uint8 images and the sub-network to run to (B, classes) float32 logits, both on the CPU.
Run = Callable[[Tensor, SubNetwork], Tensor]
# Does what makes later batches of a sub-network and a batch size fast.
Prepare = Callable[[SubNetwork, int], object]


@dataclass(frozen=True, slots=True)
class Captured:
    """The CUDA graphs that an engine holds.

    Attributes:
        num_graphs: number of graphs.
        held_bytes: GPU memory that they take.
    """

    num_graphs: int
    held_bytes: int


class Engine(Protocol):
    """Runs batches; called from one thread at a time.

    Attributes:
        is_on_gpu: whether a GPU computes, so that others' load on the CPUs slows no batch down.
        pads_batches: whether a batch of an unprepared size takes as long as one of the next prepared size.
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
        """Return the number of CUDA graphs held and their memory; None for an engine without CUDA graphs."""
        ...

    def fitting_images(self) -> int | None:
        """Return how many images in one batch fit into the memory that is free now; None where memory is no limit."""
        ...

    def describe(self) -> str:
        """Return library, device, precision and threads: what latency depends on, and the same at every start."""
        ...

    def close(self) -> None:
        """Free the memory: the engine cannot be used afterwards, whatever still refers to it."""
        ...
