"""Token scoring and selection as small pure functions.

Legend for this package: B batch, N tokens with the class token, D width, H heads, S image side in pixels.
"""

import torch
from torch import Tensor


def class_attention_scores(query: Tensor, key: Tensor, scale: float, num_prefix: int = 1) -> Tensor:
    """Attention that the class token pays to each patch token, averaged over heads (paper, section 3.2).

    Only the class token's row of the (N, N) attention is computed.

    Args:
        query: (B, H, N, D / H), class token first.
        key: (B, H, N, D / H), class token first.
        scale: factor on the dot products.
        num_prefix: P, tokens before the patch tokens, class token included.

    Returns:
        (B, N - P), softmax weights over all N tokens, without those of the prefix tokens.
    """
    row = (query[:, :, :1] * scale) @ key.transpose(-2, -1)  # (B, H, 1, N)
    return row.softmax(dim=-1)[:, :, 0, num_prefix:].mean(dim=1)


def keep_top_tokens(tokens: Tensor, scores: Tensor, keep: int, fuse: bool = False) -> Tensor:
    """Keep the prefix tokens and the best-scored patch tokens.

    Args:
        tokens: (B, P + M, D), P prefix tokens first, of which one is the class token.
        scores: (B, M), one per patch token.
        keep: patch tokens to keep, 1 <= keep <= M.
        fuse: whether the sum of the others, weighted by their scores, stays as one token (EViT, section 3.2).

    Returns:
        (B, P + keep, D), prefix tokens first, the others in no particular order; or (B, P + keep + 1, D), the fused
        token last, where there was something to fuse.
    """
    num_prefix = tokens.shape[1] - scores.shape[1]
    prefix, patches = tokens[:, :num_prefix], tokens[:, num_prefix:]
    kept = scores.topk(keep, dim=1, sorted=False).indices  # (B, keep)
    index = kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    parts = [prefix, patches.gather(1, index)]
    if fuse and keep < scores.shape[1]:
        weights = scores.scatter(1, kept, 0.0).unsqueeze(-1)  # (B, M, 1)
        parts.append((weights * patches).sum(dim=1, keepdim=True))
    return torch.cat(parts, dim=1)
