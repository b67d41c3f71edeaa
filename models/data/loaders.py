"""Loaders of labelled images, by one process or shared out over several."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from models.data.datasets import ImageSet, Sample, TrainingSamples
from models.errors import DataError
from models.processes import gather


class SampleLoader(DataLoader[Sample]):
    """A DataLoader whose every pass ends in a report of unreadable images, so that all processes must end it.

    Its worker processes hand on a DataError as the one line that it was.
    """

    dataset: ImageSet | TrainingSamples  # type: ignore[assignment] # of targets that are tensors, too

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # a generator is all that a loop needs
        """Yield batches.

        Raises:
            DataError: too many images cannot be read.
        """
        try:
            yield from super().__iter__()
        except DataError as error:
            # A worker's error arrives as its type with the whole traceback for a message, which ends in our line.
            _, _, line = str(error).rpartition(f"{DataError.__module__}.{DataError.__name__}: ")
            raise DataError(line.strip()) from None
        self.dataset.report()


def load_in_turn(
    images: ImageSet, chosen: Sequence[int], batch_size: int, workers: int, rank: int, processes: int
) -> SampleLoader:
    """Load the chosen images once over all processes: the batches of one process, dealt out in turn.

    Every batch is the same however many processes there are, so what is computed of it is as well.
    """
    batches = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    own: Any = batches[rank::processes]  # sequences of indices, where torch asks for lists
    return SampleLoader(images, batch_sampler=own, num_workers=workers, persistent_workers=workers > 0)


def gather_in_turn(own: Sequence[Tensor]) -> Tensor:
    """Join what all processes made of the batches of `load_in_turn`, in the order of the images.

    Args:
        own: a tensor of this process for each of its batches, along whose first dimension the images lie.

    Returns:
        (M, ...), on the CPU, the same in every process.
    """
    return join_in_turn(gather([tensor.cpu() for tensor in own]))


def join_in_turn(shares: Sequence[Sequence[Tensor]]) -> Tensor:
    """Join tensors, along their first dimension, that were dealt out in turn, a share to each process."""
    dealt = itertools.zip_longest(*shares)
    return torch.cat([tensor for turn in dealt for tensor in turn if tensor is not None])
