"""The family of sub-networks that one set of SuperViT weights contains, and the one rule for token counts.

Pure values: no torch here, so that policies, simulators and tables can be used without it.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Flavour = Literal["deit", "lvvit"]
Pooling = Literal["class", "distilled", "mean"]
Activation = Literal["gelu", "quick_gelu"]
Interpolation = Literal["bicubic", "bilinear"]

MIN_CROP_FRACTION = 0.1  # below it, images would be resized to over ten times the side that the model sees
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
KINDS = {"flavour": Flavour, "pooling": Pooling, "activation": Activation, "interpolation": Interpolation}


@dataclass(frozen=True, slots=True, order=True)
class SubNetwork:
    """One (patch grid, keep rate) of the shared weights.

    Attributes:
        patch_grid: patches per side of the resized image, at least 1.
        keep_rate: fraction of the tokens that each prune block keeps, in (0, 1]; 1 prunes nothing.

    Raises:
        ValueError: a value is outside its range.
    """

    patch_grid: int
    keep_rate: float

    def __post_init__(self) -> None:
        if self.patch_grid < 1:
            raise ValueError(f"patch grid must be at least 1, not {self.patch_grid}")
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"keep rate must be in (0, 1], not {self.keep_rate}")

    def __str__(self) -> str:
        return f"grid {self.patch_grid} at keep rate {self.keep_rate:.10g}"


def num_kept_patch_tokens(num_patch_tokens: int, keep_rate: float) -> int:
    """Count the patch tokens that a prune block keeps: ceil(rate * N), N with the class token, and at most all."""
    return min(math.ceil(keep_rate * (num_patch_tokens + 1)), num_patch_tokens)


@dataclass(frozen=True, slots=True)
class SuperViTConfig:
    """The architecture, its family of sub-networks and its preprocessing.

    Attributes:
        flavour: "deit" (one patch convolution, exact GELU, qkv bias) or "lvvit" (convolutional stem with batch norm, no
            qkv bias, residual branches halved, auxiliary head on the patch tokens).
        width: D, the length of a token; a multiple of `num_heads`.
        depth: number of transformer blocks.
        num_heads: H, the number of attention heads.
        mlp_ratio: hidden width of the MLP over D.
        patch_kernel: side in pixels of the square that one patch token sees; even for "lvvit", whose stem halves the
            side.
        patch_grids: the trained grids, strictly ascending; the largest sees the image at full size.
        keep_rates: the trained keep rates, strictly ascending in (0, 1]; a SuperViT's last is 1.
        prune_blocks: 0-based blocks that prune when the keep rate is under 1.
        fuse_pruned: whether a prune block adds one token, the sum of the tokens that it prunes, weighted by their
            scores (EViT: Liang et al., ICLR 2022); a SuperViT drops them without one.
        num_classes: length of the logits.
        stem_width: channels of the "lvvit" stem; unused by "deit".
        num_prefix_tokens: tokens before the patch tokens, which are never pruned: the class token, then a distillation
            token or registers (Darcet et al., ICLR 2024).
        pooling: what the head reads: the class token, the class and the distillation token side by side, or the mean of
            the patch tokens, normalised after averaging. "lvvit" reads the class token.
        pre_norm: whether tokens are normalised before the first block, as in CLIP.
        activation: the MLPs' activation: exact GELU, or x * sigmoid(1.702 x) as in OpenAI's CLIP.
        norm_eps: epsilon of every LayerNorm; None for the flavour's, 1e-6 or, for "lvvit", 1e-5.
        aux_head_weight: weight of the auxiliary head's logits in the logits of "lvvit"; unused by "deit".
        mean, std: normalisation per RGB channel, of pixel values in [0, 1].
        interpolation: how images are resized before the crop, with antialiasing.
        crop_fraction: side of the evaluation crop over the shorter side of the resized image, in [0.1, 1].

    Raises:
        ValueError: the values contradict one another.
    """

    flavour: Flavour = "deit"
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    patch_kernel: int = 16
    patch_grids: tuple[int, ...] = (8, 10, 12, 14)
    keep_rates: tuple[float, ...] = (0.5, 0.7, 1.0)
    prune_blocks: tuple[int, ...] = (3, 6, 9)
    fuse_pruned: bool = False
    num_classes: int = 1000
    stem_width: int = 64
    num_prefix_tokens: int = 1
    pooling: Pooling = "class"
    pre_norm: bool = False
    activation: Activation = "gelu"
    norm_eps: float | None = None
    aux_head_weight: float = 0.25
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Interpolation = "bicubic"
    crop_fraction: float = 0.875

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {getattr(self, name)!r}")
        for name in ("width", "depth", "num_heads", "patch_kernel", "num_classes", "stem_width", "num_prefix_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.num_heads} heads")
        if not 1 <= self.width * self.mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio must be finite and at least 1 / width, not {self.mlp_ratio}")
        if self.flavour == "lvvit" and self.patch_kernel % 2:
            raise ValueError(f"the lvvit stem needs an even patch kernel, not {self.patch_kernel}")
        if self.flavour == "lvvit" and (self.pooling != "class" or self.num_prefix_tokens > 1 or self.pre_norm):
            raise ValueError("an lvvit must have one prefix token, pooling class and no pre_norm")
        if self.pooling == "distilled" and self.num_prefix_tokens < 2:
            raise ValueError("pooling distilled needs at least two prefix tokens")
        if self.norm_eps is not None and not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps must be in (0, 1), not {self.norm_eps}")
        if not math.isfinite(self.aux_head_weight):
            raise ValueError(f"aux_head_weight must be finite, not {self.aux_head_weight}")
        if not _ascending(self.patch_grids) or self.patch_grids[0] < 2:
            raise ValueError(f"patch grids must ascend from at least 2, not {self.patch_grids}")
        if not _ascending(self.keep_rates) or self.keep_rates[0] <= 0 or self.keep_rates[-1] > 1:
            raise ValueError(f"keep rates must ascend in (0, 1], not {self.keep_rates}")
        if any(not 0 <= block < self.depth for block in self.prune_blocks):
            raise ValueError(f"prune blocks {self.prune_blocks} must lie in 0..{self.depth - 1}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError("mean and std need three values each, std above 0")
        if not all(map(math.isfinite, self.mean + self.std)):
            raise ValueError("mean and std must be finite")
        if not MIN_CROP_FRACTION <= self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be in [{MIN_CROP_FRACTION}, 1], not {self.crop_fraction}")

    @property
    def image_side(self) -> int:
        """S, the side in pixels of the full-size input."""
        return self.patch_grids[-1] * self.patch_kernel

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def subnetworks(self) -> tuple[SubNetwork, ...]:
        """The trained family, by grid and then by keep rate."""
        return tuple(SubNetwork(grid, rate) for grid in self.patch_grids for rate in self.keep_rates)

    def nearest_trained(self, subnetwork: SubNetwork) -> frozenset[SubNetwork]:
        """Return the trained sub-networks of the nearest keep rates on both sides: itself alone, if it was trained."""
        rate = subnetwork.keep_rate
        lower = max((each for each in self.keep_rates if each <= rate), default=self.keep_rates[0])
        higher = min((each for each in self.keep_rates if each >= rate), default=self.keep_rates[-1])
        return frozenset(SubNetwork(subnetwork.patch_grid, each) for each in (lower, higher))

    @property
    def largest(self) -> SubNetwork:
        """The sub-network that costs most: the largest grid at the highest keep rate."""
        return SubNetwork(self.patch_grids[-1], self.keep_rates[-1])

    @property
    def layer_norm_eps(self) -> float:
        """Epsilon of every LayerNorm."""
        return self.norm_eps or (1e-6 if self.flavour == "deit" else 1e-5)

    @property
    def head_width(self) -> int:
        """Length of the features that the head reads."""
        return self.width * (2 if self.pooling == "distilled" else 1)

    def num_tokens(self, subnetwork: SubNetwork) -> int:
        """Count the tokens that enter the first block of `subnetwork`, prefix tokens included."""
        return subnetwork.patch_grid**2 + self.num_prefix_tokens

    def patch_size_px(self, subnetwork: SubNetwork) -> float:
        """Return the side of one patch in pixels of the full-size input: a coarser grid has larger patches."""
        return self.image_side / subnetwork.patch_grid

    def tokens_per_block(self, subnetwork: SubNetwork) -> tuple[tuple[int, int], ...]:
        """Count the tokens that attention and MLP of each block see, prefix tokens included (paper, 3.2)."""
        counts = []
        patches = subnetwork.patch_grid**2
        for block in range(self.depth):
            before = patches
            if block in self.prune_blocks and subnetwork.keep_rate < 1:
                kept = num_kept_patch_tokens(before, subnetwork.keep_rate)
                patches = kept + (self.fuse_pruned and kept < before)
            counts.append((self.num_prefix_tokens + before, self.num_prefix_tokens + patches))
        return tuple(counts)


def _ascending(values: Sequence[float]) -> bool:
    return len(values) > 0 and all(low < high for low, high in itertools.pairwise(values))
