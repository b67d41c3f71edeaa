"""The processes of a torchrun: which of them this is, its random numbers and what it gathers."""

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

LONGEST_WAIT = timedelta(hours=6)  # of one process for another

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Process:
    """Which of the processes of a run this is, and where it computes."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that saves, logs and prints."""
        return self.rank == 0


def join_processes(device: str) -> Process:
    """Find out from torchrun's environment, if there is one, which process this is, and pick its device.

    Raises:
        DeviceError: the device cannot be used.
    """
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    own_device = resolve_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)  # or NCCL and pinned memory would open GPU 0 in every process
    if count > 1 and not distributed.is_initialized():
        # The others wait while the first saves: as long as that takes, and torch's ten minutes may not do.
        distributed.init_process_group("nccl" if own_device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    return Process(rank, count, own_device)


def seed_everything(*parts: int) -> None:
    """Seed every generator that training draws from by what `parts` say together."""
    seed = random.Random("/".join(map(str, parts))).getrandbits(32)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm's mixup draws from it
    torch.manual_seed(seed)


@contextmanager
def joined_processes(device: str) -> Iterator[Process]:
    """Join the processes, and leave them at the end.

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
    """Whether this process, alone or among others, is the one that prints."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def gather(value: T) -> list[T]:
    """Return what every process gave, by rank. All of them must call it; tensors must be on the CPU."""
    if not distributed.is_initialized():
        return [value]
    values: list[T] = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def share_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers, as each has the batch-norm statistics of its own images."""
    if distributed.is_initialized():
        for buffer in module.buffers():
            distributed.broadcast(buffer, 0)
