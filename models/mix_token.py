"""MixToken (Jiang et al., "All tokens matter", NeurIPS 2021): CutMix among the patch tokens of a batch.

Images exchange the tokens inside one box with those of the batch in reverse order. A second exchange undoes the first.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenExchange:
    """What the images of a batch exchange on one grid, as tensors: a compiled step then fits every box.

    Attributes:
        inside: (G * G, 1) bool, the patch tokens that are exchanged.
        share_outside: (), share of the largest grid's tokens that stay where they are: the lambda of CutMix.
    """

    inside: Tensor
    share_outside: Tensor


@dataclass(frozen=True, slots=True)
class TokenBox:
    """A box of rows and columns of a patch grid, ends excluded, whose tokens are exchanged.

    Attributes:
        patch_grid: the grid whose rows and columns the other attributes count.
        top, bottom: rows, 0 <= top <= bottom <= patch_grid.
        left, right: columns, 0 <= left <= right <= patch_grid.
    """

    patch_grid: int
    top: int
    bottom: int
    left: int
    right: int

    @property
    def share_outside(self) -> float:
        """Share of the grid's tokens that stay where they are: the lambda of CutMix."""
        return 1 - (self.bottom - self.top) * (self.right - self.left) / self.patch_grid**2

    def on_grid(self, patch_grid: int) -> "TokenBox":
        """Scale the box to another grid, each of its sides rounded down."""
        sides = (self.top, self.bottom, self.left, self.right)
        return TokenBox(patch_grid, *(side * patch_grid // self.patch_grid for side in sides))

    def exchange_on(self, patch_grid: int, device: torch.device) -> TokenExchange:
        """Return the exchange on a grid, to which the box is scaled."""
        box = self.on_grid(patch_grid)
        inside = torch.zeros(patch_grid, patch_grid, 1, dtype=torch.bool)
        inside[box.top : box.bottom, box.left : box.right] = True
        return TokenExchange(inside.flatten(0, 1).to(device), torch.tensor(self.share_outside, device=device))


def draw_box(patch_grid: int, seed: int, step: int) -> TokenBox:
    """Draw the box of a step as CutMix does (Yun et al., ICCV 2019): its area from Beta(1, 1), its centre anywhere.

    The box is cut off at the edges of the grid. It depends on seed and step alone, so every process of a run draws the
    same box, and so does a resumed run.
    """
    choice = random.Random(f"{seed}/{step}/box")
    half = int(patch_grid * math.sqrt(1 - choice.betavariate(1, 1))) // 2
    row, column = choice.randrange(patch_grid), choice.randrange(patch_grid)
    rows, columns = ((max(0, centre - half), min(patch_grid, centre + half)) for centre in (row, column))
    return TokenBox(patch_grid, *rows, *columns)


def exchange_tokens(tokens: Tensor, exchange: TokenExchange) -> Tensor:
    """Exchange (B, G * G, D) patch tokens, row by row and without prefix tokens, with those of the reversed batch."""
    return torch.where(exchange.inside, tokens.flip(0), tokens)


def mix_labels(labels: Tensor, exchange: TokenExchange) -> Tensor:
    """Mix (B, classes) probabilities with those of the batch in reverse order, by their shares of the largest grid."""
    return labels.flip(0).lerp(labels, exchange.share_outside)
