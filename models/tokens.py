"""Token scoring and selection as small pure functions.

Legend for this package: B batch, N tokens with the class token, D width, H heads, S image side in pixels.
"""

import torch
from torch import Tensor


def class_attention_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention that the class token pays to each patch token, averaged over heads (paper, section 3.2).

    Only the class token's row of the (N, N) attention is computed.

    Args:
        query: (B, H, N, D / H), class token first.
        key: (B, H, N, D / H), class token first.
        scale: factor on the dot products.

    Returns:
        (B, N - 1), softmax weights over all N tokens, without the class token's own.
    """
    row = (query[:, :, :1] * scale) @ key.transpose(-2, -1)  # (B, H, 1, N)
    return row.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)


def keep_top_tokens(tokens: Tensor, scores: Tensor, keep: int, fuse: bool = False) -> Tensor:
    """Keep the class token and the best-scored patch tokens.

    Args:
        tokens: (B, N, D), class token first.
        scores: (B, N - 1), one per patch token.
        keep: patch tokens to keep, 1 <= keep <= N - 1.
        fuse: whether the sum of the others, weighted by their scores, stays as one token (EViT, section 3.2).

    Returns:
        (B, 1 + keep, D), class token first, the others in no particular order; or (B, 2 + keep, D), the fused token
        last, where there was something to fuse.
    """
    kept = scores.topk(keep, dim=1, sorted=False).indices  # (B, keep)
    index = kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    parts = [tokens[:, :1], tokens[:, 1:].gather(1, index)]
    if fuse and keep < scores.shape[1]:
        weights = scores.scatter(1, kept, 0.0).unsqueeze(-1)  # (B, N - 1, 1)
        parts.append((weights * tokens[:, 1:]).sum(dim=1, keepdim=True))
    return torch.cat(parts, dim=1)
