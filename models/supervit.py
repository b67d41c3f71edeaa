"""SuperViT: one vision transformer, many sub-networks, one set of weights (Lin et al., IJCV 2023, arXiv 2205.11397).

The forward pass takes its sub-network as an argument and keeps no state between calls.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.init import trunc_normal_

from models.layers import Block, ConvStem, PatchEmbed
from models.mix_token import TokenExchange, exchange_tokens
from models.subnetwork import SubNetwork, SuperViTConfig
from models.tokens import keep_origins

DEIT_SMALL = SuperViTConfig()
LVVIT_SMALL = SuperViTConfig(flavour="lvvit", depth=16, mlp_ratio=3.0, crop_fraction=0.9)
# Blocks 1, 3 and 4 of 6 prune, so that keep rates 0.5 and 0.7 cost the same shares of keep rate 1 as in DeiT-S.
DEIT_MICRO = SuperViTConfig(
    width=96,
    depth=6,
    num_heads=3,
    patch_kernel=4,
    patch_grids=(5, 6, 7, 8),
    prune_blocks=(1, 3, 4),
    num_classes=10,
    crop_fraction=1.0,
)
# It first prunes one block later: at the largest grid, keep rate 0.5 costs 0.73 of keep rate 1, against 0.48 in
# DEIT_MICRO.
LVVIT_MICRO = SuperViTConfig(
    flavour="lvvit",
    width=96,
    depth=6,
    num_heads=3,
    mlp_ratio=3.0,
    patch_kernel=4,
    patch_grids=(5, 6, 7, 8),
    prune_blocks=(2, 3, 4),
    num_classes=10,
    crop_fraction=1.0,
)

# Divides the residual branches; a constant of the published backbones, which no checkpoint varies.
SKIP_DIVISOR = {"deit": 1.0, "lvvit": 2.0}


class PatchTrace(NamedTuple):
    """The tokens that a prune block kept.

    Attributes:
        block: index of the block.
        kept: (B, K) patch numbers, row by row from 0, in no particular order; FUSED is the token into which an earlier
            block fused those that it pruned.
        scores: (B, K) class attention of the kept tokens.
    """

    block: int
    kept: Tensor
    scores: Tensor


class SuperViT(nn.Module):
    """The shared-weight model.

    Parameter names are those of the published checkpoints; `pos_embed_list.0` belongs to the smallest grid.
    """

    def __init__(self, config: SuperViTConfig, drop_path_rate: float = 0.0) -> None:
        """Build the model with fresh weights.

        Args:
            config: the architecture.
            drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.
        """
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        # timm reads a model's preprocessing from this attribute.
        self.pretrained_cfg = {
            "input_size": (3, config.image_side, config.image_side),
            "mean": config.mean,
            "std": config.std,
            "interpolation": config.interpolation,
            "crop_pct": config.crop_fraction,
        }
        deit = config.flavour == "deit"
        self.cls_token = nn.Parameter(torch.zeros(1, config.num_prefix_tokens, config.width))
        self.patch_embed: nn.Module = (
            PatchEmbed(config.patch_kernel, config.width)
            if deit
            else ConvStem(config.patch_kernel, config.stem_width, config.width)
        )
        self.pos_embed_list = nn.ParameterList(
            nn.Parameter(torch.zeros(1, config.num_tokens(SubNetwork(grid, 1.0)), config.width))
            for grid in config.patch_grids
        )
        eps = config.layer_norm_eps
        self.norm_pre = nn.LayerNorm(config.width, eps=eps) if config.pre_norm else None
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.num_heads,
                config.mlp_width,
                qkv_bias=deit,
                norm_eps=eps,
                skip_divisor=SKIP_DIVISOR[config.flavour],
                drop_path=drop_path_rate * block / max(1, config.depth - 1),
                fuse_pruned=config.fuse_pruned,
                num_prefix=config.num_prefix_tokens,
                activation=config.activation,
            )
            for block in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=eps)
        self.head = nn.Linear(config.head_width, config.num_classes)
        self.aux_head = None if deit else nn.Linear(config.width, config.num_classes)
        if not deit:  # a DeiT's patch projection keeps torch's initial weights, as in timm
            self.patch_embed.apply(_init_convolution)
        self.apply(_init_linear)
        trunc_normal_(self.cls_token, std=0.02)
        for pos_embed in self.pos_embed_list:
            trunc_normal_(pos_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters exempt from weight decay (timm's optimizer factory asks for them)."""
        return {"cls_token", *(f"pos_embed_list.{i}" for i in range(len(self.pos_embed_list)))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return which parameters belong to which layer (timm's optimizer factory asks, for layer-wise rate decay)."""
        del coarse
        stem = r"^cls_token|^pos_embed|^patch_embed|^norm_pre"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))]}

    def forward(self, images: Tensor, subnetwork: SubNetwork | None = None) -> Tensor:
        """Classify a batch through one sub-network.

        Args:
            images: (B, 3, S, S) float, normalised, at full size.
            subnetwork: a trained patch grid with any keep rate in (0, 1]; the largest sub-network by default.

        Returns:
            (B, classes) logits.

        Raises:
            ValueError: the images are not (B, 3, S, S), or the grid has no position embedding.
        """
        subnetwork = subnetwork or self.config.largest
        tokens = self.embed(images, subnetwork.patch_grid)
        return self.classify(self.transform(tokens, subnetwork.keep_rate, 0, self.config.depth))

    def forward_rates(
        self, images: Tensor, patch_grid: int, keep_rates: tuple[float, ...], exchange: TokenExchange | None = None
    ) -> tuple[Tensor, ...]:
        """Run a batch through all blocks at several keep rates, computing their common part once.

        All keep rates see the same tokens until the first prune block, so a training step at several rates runs the
        embedding and the blocks before it only once, in the forward and in the backward pass.

        Args:
            images: (B, 3, S, S) float, normalised, at full size.
            patch_grid: a trained grid.
            keep_rates: rates in (0, 1].
            exchange: the patch tokens of this grid that the images exchange; None to exchange none.

        Returns:
            For each of `keep_rates`, the (B, N, D) tokens after the last block at (patch_grid, keep rate).
        """
        depth = self.config.depth
        fork = min(self.config.prune_blocks, default=depth)
        tokens = self.transform(self.embed(images, patch_grid, exchange), 1.0, 0, fork)
        return tuple(self.transform(tokens, rate, fork, depth) for rate in keep_rates)

    def embed(self, images: Tensor, patch_grid: int, exchange: TokenExchange | None = None) -> Tensor:
        """Resize (B, 3, S, S) images to the grid and embed them as (B, N, D) tokens, prefix tokens first."""
        side = self.config.image_side
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(f"images must be (B, 3, {side}, {side}), not {tuple(images.shape)}")
        if patch_grid not in self.config.patch_grids:
            raise ValueError(f"patch grid {patch_grid} was not trained; it must be one of {self.config.patch_grids}")
        if patch_grid != self.config.patch_grids[-1]:
            grid_side = patch_grid * self.config.patch_kernel
            images = functional.interpolate(images, (grid_side, grid_side), mode="bilinear", align_corners=True)
        patches = self.patch_embed(images)
        if exchange is not None:
            patches = exchange_tokens(patches, exchange)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        embedded: Tensor = tokens + self.pos_embed_list[self.config.patch_grids.index(patch_grid)]
        return embedded if self.norm_pre is None else self.norm_pre(embedded)

    def features(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        """Compute the (B, head width) features of (B, 3, S, S) images that the head of `subnetwork` reads."""
        tokens = self.embed(images, subnetwork.patch_grid)
        return self.pool(self.transform(tokens, subnetwork.keep_rate, 0, self.config.depth))

    def transform(self, tokens: Tensor, keep_rate: float, start: int, stop: int) -> Tensor:
        """Run blocks start..stop-1 over (B, N, D) tokens; prune blocks return fewer tokens."""
        for index in range(start, stop):
            tokens = self.blocks[index](tokens, self._rate_of(index, keep_rate))
        return tokens

    def trace(self, images: Tensor, subnetwork: SubNetwork) -> tuple[Tensor, tuple[PatchTrace, ...]]:
        """Classify as `forward` does, and return which patches each prune block kept.

        Returns:
            (B, classes) logits, and a trace for each prune block; no trace where the keep rate is 1.
        """
        tokens = self.embed(images, subnetwork.patch_grid)
        origins = torch.arange(subnetwork.patch_grid**2, device=tokens.device).expand(len(images), -1)
        traces = []
        for index in range(self.config.depth):
            block: Block = self.blocks[index]  # type: ignore[assignment] # a ModuleList has no element type
            tokens, pruning = block.attend(tokens, self._rate_of(index, subnetwork.keep_rate))
            if pruning is not None:
                scores, kept = pruning
                traces.append(PatchTrace(index, origins.gather(1, kept), scores.gather(1, kept)))
                origins = keep_origins(origins, pruning, self.config.fuse_pruned)
            tokens = block.feed_forward(tokens)
        return self.classify(tokens), tuple(traces)

    def _rate_of(self, block: int, keep_rate: float) -> float:
        return keep_rate if block in self.config.prune_blocks else 1.0

    def classify(self, tokens: Tensor) -> Tensor:
        """Map the (B, N, D) tokens that the last block left to (B, classes) logits.

        The auxiliary head's logits are added to the class head's, except in training, where the auxiliary head has
        labels of its own.
        """
        logits: Tensor = self.head(self.pool(tokens))
        of_patches = None if self.training else self.classify_patches(tokens)
        return logits if of_patches is None else logits + self.config.aux_head_weight * of_patches.amax(dim=1)

    def classify_patches(self, tokens: Tensor) -> Tensor | None:
        """Map the tokens that the last block left to (B, patches, classes) logits; None without an auxiliary head."""
        return None if self.aux_head is None else self.aux_head(self.norm(tokens[:, self.config.num_prefix_tokens :]))

    def pool(self, tokens: Tensor) -> Tensor:
        """Map the (B, N, D) tokens that the last block left to the (B, head width) features that the head reads."""
        match self.config.pooling:
            case "class":
                read = tokens[:, :1]
            case "distilled":
                read = tokens[:, :2]
            case "mean":
                read = tokens[:, self.config.num_prefix_tokens :].mean(dim=1, keepdim=True)
        features: Tensor = self.norm(read).flatten(1)
        return features


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _init_convolution(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
