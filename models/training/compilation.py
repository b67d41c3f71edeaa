"""Compiling the training step with torch's own compiler, which needs another: of C++ for a CPU, Triton for a GPU."""

import torch
from torch import _dynamo as dynamo
from torch import nn

from models.training.state import TrainingError

MOST_VARIANTS = 64  # grids with their keep rates, of which torch would compile eight and run the others as they are


def compile_in_place(module: nn.Module, device: torch.device) -> None:
    """Let `module` be compiled when it is first called, and again for every other kind of arguments.

    Raises:
        TrainingError: there is no compiler for `device`.
    """
    try:
        torch.compile(torch.exp)(torch.zeros(2, device=device))
    except (ImportError, OSError, RuntimeError) as error:  # torch wraps what a compiler says in one of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise TrainingError(f"compile finds no compiler for {device.type}: {reason}") from error
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, MOST_VARIANTS)
    module.compile(dynamic=False)  # token counts are as few as the sub-networks
