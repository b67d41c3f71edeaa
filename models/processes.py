"""The processes of a training run: which of them this is, where it computes, and its random numbers."""

import os
import random
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from torch import distributed

from models.devices import resolve_device

LONGEST_WAIT = timedelta(hours=6)  # of one process for another


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
    """Find out from torchrun's environment, if there is one, which process this is, and pick its device."""
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    own_device = resolve_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)  # or NCCL and pinned memory would open GPU 0 in every process
    if count > 1 and not distributed.is_initialized():
        # The others wait while the first watches and saves: as long as that takes, and torch's ten minutes may not do.
        distributed.init_process_group("nccl" if own_device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    return Process(rank, count, own_device)


def seed_everything(*parts: int) -> None:
    """Seed every generator that training draws from by what `parts` say together."""
    seed = random.Random("/".join(map(str, parts))).getrandbits(32)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm's mixup draws from it
    torch.manual_seed(seed)
