"""Initial weights, from another SuperViT or a plain ViT, and their resampling to a family of sub-networks."""

from dataclasses import dataclass
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from models.files.checkpoint_errors import CheckpointMismatchError
from models.published import class_indices
from models.subnetwork import SuperViTConfig
from models.supervit import SuperViT

PER_CLASS = ("head.weight", "head.bias", "aux_head.weight", "aux_head.bias")
# Settings that change a network's answers but not the shapes of its weights.
SETTINGS_NOT_IN_SHAPES = ("num_heads", "pooling", "activation", "layer_norm_eps")


@dataclass(frozen=True, slots=True)
class InitialWeights:
    """Weights from a file for a model to start from.

    Attributes:
        path: the file, for messages.
        weights: by a SuperViT's names, without position embeddings; without the head's where the file has none.
        positions: (1, P + grid ** 2, D) position embeddings by patch grid, prefix tokens first.
        config: the architecture, its preprocessing and a family of sub-networks; None where a bare state dict does not
            determine them.
        class_names: one per logit; None where the file names none.
    """

    path: Path
    weights: dict[str, Tensor]
    positions: dict[int, Tensor]
    config: SuperViTConfig | None = None
    class_names: tuple[str, ...] | None = None

    @property
    def has_head(self) -> bool:
        """Whether the file has a classifier."""
        return "head.weight" in self.weights

    def has_head_for(self, class_names: tuple[str, ...]) -> bool:
        """Return whether the head answers these classes, in this order, as far as the file says."""
        if not self.has_head or len(self.weights["head.weight"]) != len(class_names):
            return False
        if self.class_names in (None, class_names):
            return True
        indices = class_indices(self.class_names or ())
        return [indices.get(name) for name in class_names] == list(range(len(class_names)))

    def load_into(self, model: SuperViT, *, with_head: bool) -> None:
        """Copy the weights into `model`.

        A patch grid without a position embedding in the file gets that of the nearest grid, resampled. A patch kernel
        of another size is resampled (Beyer et al., "FlexiViT", CVPR 2023). Unless `with_head` is set, the model keeps
        its own head.

        Raises:
            CheckpointMismatchError: the weights are not this model's.
        """
        weights = self._resampled(model.config)
        if not with_head:
            weights = {name: tensor for name, tensor in weights.items() if name not in PER_CLASS}
        own = model.state_dict()
        missing = sorted(own.keys() - weights.keys() - set(PER_CLASS))
        misfit = sorted(name for name in weights if name not in own or weights[name].shape != own[name].shape)
        if missing or misfit:
            raise CheckpointMismatchError(
                f"{self.path}: its weights do not match this model: {len(missing)} missing {missing[:3]}, "
                f"{len(misfit)} unexpected or of the wrong shape {misfit[:3]}"
            )
        for name in SETTINGS_NOT_IN_SHAPES if self.config else ():
            theirs, ours = getattr(self.config, name), getattr(model.config, name)
            if theirs != ours:
                raise CheckpointMismatchError(
                    f"{self.path}: its weights do not match this model: {name} is {theirs}, not {ours}"
                )
        model.load_state_dict(weights, strict=False)

    def _resampled(self, config: SuperViTConfig) -> dict[str, Tensor]:
        weights = dict(self.weights)
        patches = weights.get("patch_embed.proj.weight")
        if config.flavour == "deit" and patches is not None and patches.shape[-1] != config.patch_kernel:
            weights["patch_embed.proj.weight"] = resample_patch_embed(patches, [config.patch_kernel] * 2)
        for index, grid in enumerate(config.patch_grids):
            nearest = _nearest(self.positions, grid)
            num_prefix = self.weights["cls_token"].shape[1]
            weights[f"pos_embed_list.{index}"] = (
                nearest
                if nearest.shape[1] == num_prefix + grid**2
                else resample_abs_pos_embed(nearest, [grid, grid], num_prefix_tokens=num_prefix)
            )
        return weights


def split_positions(path: Path, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """Separate the weights of a SuperViT from its position embeddings, and find the patch grid of each embedding.

    Raises:
        CheckpointMismatchError: a position embedding is not that of prefix tokens and a square of patches.
    """
    rest = {name: tensor for name, tensor in weights.items() if not name.startswith("pos_embed")}
    num_prefix = rest["cls_token"].shape[1] if rest.get("cls_token", torch.zeros(0)).ndim == 3 else 1
    positions = {}
    for name, tensor in weights.items():
        if name.startswith("pos_embed"):
            patches = tensor.shape[1] - num_prefix if tensor.ndim == 3 else 0
            grid = round(max(0, patches) ** 0.5)
            if patches < 1 or grid**2 != patches:
                raise CheckpointMismatchError(
                    f"{path}: the position embedding must be that of prefix tokens and a square patch grid, not "
                    f"{tuple(tensor.shape)}"
                )
            positions[grid] = tensor
    return rest, positions


def _nearest(by_grid: dict[int, Tensor], grid: int) -> Tensor:
    """Return the embedding of the nearest grid; of two equally near, that of the larger, which has no detail less."""
    return by_grid[min(by_grid, key=lambda known: (abs(known - grid), -known))]
