"""Loaders of labelled images, for one process or shared among several."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from models.data.datasets import ImageSet, Sample, TrainingSamples
from models.errors import DataError
from models.processes import Process, gather


class SampleLoader(DataLoader[Sample]):
    """A DataLoader that reports unreadable images at the end of each pass, so all processes must finish the pass.

    A DataError in one of its worker processes is raised again with its original one-line message.
    """

    dataset: ImageSet | TrainingSamples  # type: ignore[assignment] # its targets may be tensors

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # a generator is all that a loop needs
        """Yield batches.

        Raises:
            DataError: too many images cannot be read.
        """
        try:
            yield from super().__iter__()
        except DataError as error:
            # A worker's error arrives with the whole traceback as its message, which ends with our line.
            _, _, line = str(error).rpartition(f"{DataError.__module__}.{DataError.__name__}: ")
            raise DataError(line.strip()) from None
        self.dataset.report()


def load_round_robin(
    images: ImageSet, chosen: Sequence[int], batch_size: int, workers: int, process: Process
) -> SampleLoader:
    """Load the chosen images once over all processes: the batches of one process, dealt out round-robin.

    Every batch is the same whatever the number of processes, and so are results computed from it.
    """
    batches = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    own: Any = batches[process.rank :: process.count]  # sequences of indices, where torch asks for lists
    return SampleLoader(images, batch_sampler=own, num_workers=workers, persistent_workers=workers > 0)


def gather_round_robin(own: Sequence[Tensor]) -> Tensor:
    """Join the results of all processes for the batches of `load_round_robin`, in the order of the images.

    Args:
        own: this process's results, a tensor per batch, with the images along the first dimension.

    Returns:
        (M, ...), on the CPU, the same in every process.
    """
    return interleave(gather([tensor.cpu() for tensor in own]))


def interleave(shares: Sequence[Sequence[Tensor]]) -> Tensor:
    """Join tensors that were dealt out round-robin, a share per process, along their first dimension."""
    dealt = itertools.zip_longest(*shares)
    return torch.cat([tensor for turn in dealt for tensor in turn if tensor is not None])
