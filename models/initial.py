"""Weights to start a training from: another SuperViT, perhaps of other grids, or a plain timm DeiT."""

import math
from pathlib import Path

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from models.checkpoint import CheckpointMismatchError, read_weights
from models.supervit import SuperViT

PER_CLASS = ("head.weight", "head.bias", "aux_head.weight", "aux_head.bias")


def load_initial_weights(model: SuperViT, path: Path) -> None:
    """Copy what `path` holds into `model`; a patch grid that it lacks gets the embedding of the nearest, resampled.

    Heads of another number of classes keep their fresh weights.

    Raises:
        CheckpointError: the file is unreadable, or its other weights are not this model's.
    """
    weights = read_weights(path)
    sources = [weights.pop(name) for name in sorted(weights) if name.startswith("pos_embed")]
    weights |= _pos_embeds(path, sources, model.config.patch_grids)
    own = model.state_dict()
    for name in PER_CLASS:
        if name in own and name in weights and weights[name].shape != own[name].shape:
            del weights[name]
    missing = sorted(own.keys() - weights.keys() - set(PER_CLASS))
    misfit = sorted(name for name in weights if name not in own or weights[name].shape != own[name].shape)
    if missing or misfit:
        raise CheckpointMismatchError(
            f"{path}: not weights of this model: {len(missing)} missing {missing[:3]}, {len(misfit)} that do not fit "
            f"{misfit[:3]}"
        )
    model.load_state_dict(weights, strict=False)


def _pos_embeds(path: Path, sources: list[Tensor], patch_grids: tuple[int, ...]) -> dict[str, Tensor]:
    """Turn position embeddings, (1, N, D) each, of a plain ViT or of a SuperViT's grids into one per patch grid."""
    by_grid = {_grid_of(path, source): source for source in sources}
    return {
        f"pos_embed_list.{index}": resample_abs_pos_embed(_nearest(by_grid, grid), [grid, grid])
        for index, grid in enumerate(patch_grids)
        if by_grid
    }


def _grid_of(path: Path, pos_embed: Tensor) -> int:
    patches = pos_embed.shape[1] - 1 if pos_embed.ndim == 3 else 0
    if patches < 1 or math.isqrt(patches) ** 2 != patches:  # a distilled DeiT has a second token before its patches
        raise CheckpointMismatchError(
            f"{path}: the position embedding, {tuple(pos_embed.shape)}, is not that of one class token and a square "
            "of patches"
        )
    return math.isqrt(patches)


def _nearest(by_grid: dict[int, Tensor], grid: int) -> Tensor:
    """Of two that are equally near, the larger: it has no detail less."""
    return by_grid[min(by_grid, key=lambda known: (abs(known - grid), -known))]
