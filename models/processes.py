"""The processes of a torchrun job: their ranks and devices, their random seeds, and what they exchange."""

import importlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from torch import distributed, nn

from models.devices import resolve_device

LONGEST_WAIT = timedelta(hours=6)  # bounds the wait of one process for another

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a run: its rank, the number of processes, and the device on which it computes."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that saves, logs and prints."""
        return self.rank == 0


ALONE = Process(rank=0, count=1, device=torch.device("cpu"))


def own_rank() -> int:
    """Return the number of this process, from 0, as torchrun's environment gives it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def join_processes(device: str) -> Process:
    """Join the processes that torchrun's environment describes, if any, and choose the device of this one.

    Raises:
        DeviceError: the device cannot be used.
    """
    rank, count = own_rank(), int(os.environ.get("WORLD_SIZE", "1"))
    own_device = resolve_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)  # otherwise NCCL and pinned memory open GPU 0 in every process
    if count > 1 and not distributed.is_initialized():
        # Optimisers import it later. The group that exists then is the default argument of its functions and never
        # destroyed; its threads abort the process if they need the interpreter after its end.
        importlib.import_module("torch.distributed.nn")
        # The others wait while the first process saves, for which torch's default of ten minutes may not be enough.
        distributed.init_process_group("nccl" if own_device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    return Process(rank, count, own_device)


def seed_everything(*parts: int) -> None:
    """Seed every random generator that training uses, by a seed derived from all of `parts`."""
    seed = random.Random("/".join(map(str, parts))).getrandbits(32)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm's mixup draws from it
    torch.manual_seed(seed)


@contextmanager
def joined_processes(device: str) -> Iterator[Process]:
    """Join the processes, and leave them at the end of the block.

    Raises:
        DeviceError: the device cannot be used.
    """
    process = join_processes(device)
    try:
        yield process
    finally:
        if process.count > 1:
            distributed.destroy_process_group()


def is_first() -> bool:
    """Return whether this process, alone or among others, is the one that prints."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def gather(value: T) -> list[T]:
    """Return the value of every process, by rank. All processes must call it; tensors must be on the CPU."""
    if not distributed.is_initialized():
        return [value]
    values: list[T] = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def share_buffers(module: nn.Module) -> None:
    """Copy the first process's buffers to all, as the batch-norm statistics of each are of its own images."""
    if distributed.is_initialized():
        for buffer in module.buffers():
            distributed.broadcast(buffer, 0)
