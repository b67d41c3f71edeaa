"""Compiles the training step with torch.compile, which itself needs a C++ compiler for a CPU or Triton for a GPU."""

import torch
from torch import _dynamo as dynamo
from torch import nn

from models.training.state import TrainingError

RECOMPILE_LIMIT = 64  # grids with their keep rates; torch's own limit is eight, and it runs any more uncompiled


def compile_in_place(module: nn.Module, device: torch.device) -> None:
    """Make `module` compile on its first call, and again for every new combination of arguments.

    Raises:
        TrainingError: there is no compiler for `device`.
    """
    try:
        torch.compile(torch.exp)(torch.zeros(2, device=device))
    except (ImportError, OSError, RuntimeError) as error:  # torch wraps the compiler's error in one of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise TrainingError(f"--compile needs a compiler for {device.type}: {reason}") from error
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    module.compile(dynamic=False)  # there are only as many token counts as sub-networks
