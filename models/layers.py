"""The layers of a SuperViT: patch embeddings, attention that can return class-token scores, and the pruning block.

They compute and draw random numbers as timm's layers of the same names do; importing timm would double the time that a
server takes to start.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.subnetwork import Activation, num_kept_patch_tokens
from models.tokens import Pruning, class_attention_scores, keep_tokens, prune_by_scores


class QuickGELU(nn.Module):
    """The approximation of GELU with which CLIP was trained."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to each number."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class PatchEmbed(nn.Module):
    """The patch embedding of a plain ViT: each patch is multiplied by the same matrix."""

    def __init__(self, patch_kernel: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_kernel, stride=patch_kernel)

    def forward(self, images: Tensor) -> Tensor:
        """Embed (B, 3, side, side) images as (B, patches, D) tokens, row by row."""
        tokens: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return tokens


class ConvStem(nn.Module):
    """The LV-ViT patch embedding (Jiang et al., NeurIPS 2021): three convolutions at half the side, then patches."""

    def __init__(self, patch_kernel: int, stem_width: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem_width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.conv2 = nn.Conv2d(stem_width, stem_width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stem_width)
        self.conv3 = nn.Conv2d(stem_width, stem_width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(stem_width)
        self.proj = nn.Conv2d(stem_width, width, patch_kernel // 2, stride=patch_kernel // 2)

    def forward(self, images: Tensor) -> Tensor:
        """Embed (B, 3, side, side) images as (B, patches, D) tokens, row by row."""
        x = functional.relu(self.bn1(self.conv1(images)))
        x = functional.relu(self.bn2(self.conv2(x)))
        x = functional.relu(self.bn3(self.conv3(x)))
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class Attention(nn.Module):
    """Multi-head self-attention that can also return how much the class token attends to each patch token."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool, num_prefix: int = 1) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_prefix = num_prefix
        self.scale = (width // num_heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, with_scores: bool) -> tuple[Tensor, Tensor | None]:
        """Attend over (B, N, D) tokens.

        Returns:
            (B, N, D) tokens and, where `with_scores` is set, the scores of `class_attention_scores`, one per patch
            token.
        """
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, D / H)
        scores = None
        if self.training and x.device.type == "cpu":
            # The backward pass of the fused kernel takes twice as long as explicit products on a CPU.
            attention = ((query * self.scale) @ key.transpose(-2, -1)).softmax(dim=-1)
            out = attention @ value
            if with_scores:
                scores = attention[:, :, 0, self.num_prefix :].mean(dim=1)
        else:
            out = functional.scaled_dot_product_attention(query, key, value, scale=self.scale)
            if with_scores:
                scores = class_attention_scores(query, key, self.scale, self.num_prefix)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width)), scores


class Mlp(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, hidden_width: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.act = activation()
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        hidden: Tensor = self.fc2(self.act(self.fc1(x)))
        return hidden


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): while training, a branch is skipped for some images of a batch."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D): zeros for the skipped images, the others scaled up to compensate."""
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        kept = x.new_empty(x.shape[0], 1, 1).bernoulli_(keep)
        return x * (kept.div_(keep) if keep > 0 else kept)


class Block(nn.Module):
    """A pre-norm transformer block that can drop its least attended tokens between attention and MLP."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_width: int,
        *,
        qkv_bias: bool,
        norm_eps: float,
        skip_divisor: float,
        drop_path: float,
        fuse_pruned: bool,
        num_prefix: int = 1,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        self.skip_divisor = skip_divisor
        self.fuse_pruned = fuse_pruned
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads, qkv_bias, num_prefix)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, mlp_width, ACTIVATIONS[activation])
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, keep_rate: float) -> Tensor:
        """Map (B, N, D) tokens to (B, N', D), where N' is smaller if the keep rate prunes tokens."""
        x, _ = self.attend(x, keep_rate)
        return self.feed_forward(x)

    def attend(self, x: Tensor, keep_rate: float) -> tuple[Tensor, Pruning | None]:
        """Attend, and prune if the keep rate is under 1; return (B, N', D) tokens and what was pruned."""
        attended, scores = self.attn(self.norm1(x), with_scores=keep_rate < 1)
        x = torch.add(x, self.drop_path(attended), alpha=1 / self.skip_divisor)
        if scores is None:
            return x, None
        pruning = prune_by_scores(scores, num_kept_patch_tokens(scores.shape[1], keep_rate))
        return keep_tokens(x, pruning, self.fuse_pruned), pruning

    def feed_forward(self, x: Tensor) -> Tensor:
        """Apply the MLP and its residual connection to (B, N, D) tokens."""
        return torch.add(x, self.drop_path(self.mlp(self.norm2(x))), alpha=1 / self.skip_divisor)
