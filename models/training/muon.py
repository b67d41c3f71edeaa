"""Muon: matrices are updated by their orthogonalised momentum, all other parameters by AdamW.

After Keller Jordan's optimiser (2024), with the step scaled to AdamW's size (Liu et al., arXiv 2502.16982).
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from timm.optim.muon import zeropower_via_newtonschulz
from torch import Tensor

MOMENTUM = 0.9
# Of five Newton-Schulz iterations, each tuned for the output of the one before it (F. Cesista, 2025).
COEFFICIENTS = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


class Muon(torch.optim.AdamW):
    """AdamW that updates matrices and convolutions with Muon instead.

    timm's Muon, which this one agrees with, orthogonalises one matrix after another in bfloat16. A CPU without
    instructions for bfloat16 spends more than a third of a training step on that. Here all matrices of one shape are
    orthogonalised together, in float32 on a CPU.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:  # noqa: ANN401 - as torch's
        """Create the optimiser for parameters or parameter groups, with a learning rate and decoupled weight decay."""
        super().__init__(params, lr, betas=(0.9, 0.95), eps=1e-7, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override] # torch's overloads
        """Take one step with the gradients of the parameters, or with those that `closure` computes."""
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and is_matrix(parameter)
        ]
        self._step_matrices(matrices)
        gradients = [parameter.grad for parameter, _ in matrices]
        for parameter, _ in matrices:  # hidden from AdamW
            parameter.grad = None
        super().step()
        for (parameter, _), gradient in zip(matrices, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _step_matrices(self, matrices: list[tuple[Tensor, dict[str, Any]]]) -> None:
        stacks: dict[tuple[int, int], list[tuple[Tensor, dict[str, Any], Tensor]]] = defaultdict(list)
        for parameter, group in matrices:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())  # unused, but AdamW expects it when it loads a state
                state["momentum"] = torch.zeros_like(parameter)
            update = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM).flatten(1)
            wide = update.mT if update.shape[0] > update.shape[1] else update
            stacks[wide.shape[0], wide.shape[1]].append((parameter, group, wide))
        for (_, columns), members in stacks.items():
            stack = torch.stack([wide for _, _, wide in members])
            dtype = torch.float32 if stack.device.type == "cpu" else torch.bfloat16
            orthogonal = zeropower_via_newtonschulz(stack, len(COEFFICIENTS), COEFFICIENTS, dtype=dtype)
            for (parameter, group, wide), direction in zip(members, orthogonal, strict=True):
                is_turned = wide.shape[0] != parameter.shape[0]
                change = (direction.mT if is_turned else direction).reshape(parameter.shape)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(change.to(parameter.dtype), alpha=-0.2 * columns**0.5 * group["lr"])


def is_matrix(parameter: Tensor) -> bool:
    """Return whether a parameter maps features to features: linear and convolutional weights, but no embeddings."""
    return parameter.ndim >= 2 and min(parameter.shape[:2]) > 1
