"""Token scoring and selection as small pure functions.

Legend for this package: B batch, N tokens with the class token, D width, H heads, S image side in pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

FUSED = -1  # in place of a patch number: a token that is the sum of several


class Pruning(NamedTuple):
    """The scores and the choice of a prune block, among the M tokens after the prefix that entered it.

    Attributes:
        scores: (B, M), as `class_attention_scores` returns them.
        kept: (B, K) indices of the kept tokens, in no particular order.
    """

    scores: Tensor
    kept: Tensor


def class_attention_scores(query: Tensor, key: Tensor, scale: float, num_prefix: int = 1) -> Tensor:
    """Compute the attention that the class token pays to each patch token, averaged over heads (paper, section 3.2).

    Only the class token's row of the (N, N) attention is computed.

    Args:
        query: (B, H, N, D / H), class token first.
        key: (B, H, N, D / H), class token first.
        scale: factor on the dot products.
        num_prefix: P, tokens before the patch tokens, class token included.

    Returns:
        (B, N - P) softmax weights, normalised over all N tokens, without those of the prefix tokens.
    """
    row = (query[:, :, :1] * scale) @ key.transpose(-2, -1)  # (B, H, 1, N)
    return row.softmax(dim=-1)[:, :, 0, num_prefix:].mean(dim=1)


def prune_by_scores(scores: Tensor, keep: int) -> Pruning:
    """Choose the `keep` patch tokens with the best of (B, M) scores, 1 <= keep <= M."""
    return Pruning(scores, scores.topk(keep, dim=1, sorted=False).indices)


def keep_tokens(tokens: Tensor, pruning: Pruning, fuse: bool = False) -> Tensor:
    """Keep the prefix tokens and the chosen patch tokens.

    Args:
        tokens: (B, P + M, D), P prefix tokens first, of which one is the class token.
        pruning: the choice among the M patch tokens.
        fuse: whether the sum of the pruned tokens, weighted by their scores, is added as one token (EViT, section 3.2).

    Returns:
        (B, P + K, D), prefix tokens first, then the chosen ones in the order of `pruning.kept`; or (B, P + K + 1, D),
        the fused token last, if `fuse` is set and a token was pruned.
    """
    scores, kept = pruning
    num_prefix = tokens.shape[1] - scores.shape[1]
    prefix, patches = tokens[:, :num_prefix], tokens[:, num_prefix:]
    index = kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])  # (B, K, D)
    parts = [prefix, patches.gather(1, index)]
    if fuse and kept.shape[1] < scores.shape[1]:
        weights = scores.scatter(1, kept, 0.0).unsqueeze(-1)  # (B, M, 1)
        parts.append((weights * patches).sum(dim=1, keepdim=True))
    return torch.cat(parts, dim=1)


def keep_origins(origins: Tensor, pruning: Pruning, fuse: bool = False) -> Tensor:
    """Select from (B, M) patch numbers as `keep_tokens` selects from patch tokens; a fused token gets FUSED."""
    kept = origins.gather(1, pruning.kept)
    is_fused = fuse and kept.shape[1] < origins.shape[1]
    return functional.pad(kept, (0, 1), value=FUSED) if is_fused else kept
