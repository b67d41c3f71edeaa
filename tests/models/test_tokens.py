import math

import torch
from torch import Tensor

from models.tokens import FUSED, Pruning, class_attention_scores, keep_origins, keep_tokens, prune_by_scores


def keep_top_tokens(tokens: Tensor, scores: Tensor, keep: int, fuse: bool = False) -> Tensor:
    return keep_tokens(tokens, prune_by_scores(scores, keep), fuse)


def test_scores_are_the_class_row_of_softmax_attention_averaged_over_heads() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(2, 3, 6, 4, generator=generator) for _ in range(2))
    attention = (query @ key.transpose(-2, -1) * 0.5).softmax(dim=-1)
    scores = class_attention_scores(query, key, scale=0.5)
    torch.testing.assert_close(scores, attention.mean(dim=1)[:, 0, 1:])


def test_scores_of_two_heads_match_numbers_worked_by_hand() -> None:
    # Head 0 weighs its three tokens 1 : 2 : 1, head 1 weighs them 1 : 1 : 8.
    query = torch.ones(1, 2, 3, 1)
    key = torch.tensor([[0.0, math.log(2), 0.0], [0.0, 0.0, math.log(8)]]).reshape(1, 2, 3, 1)
    scores = class_attention_scores(query, key, scale=1.0)
    torch.testing.assert_close(scores, torch.tensor([[(2 / 4 + 1 / 10) / 2, (1 / 4 + 8 / 10) / 2]]))


def test_the_class_token_stays_first_and_the_highest_scored_tokens_are_kept() -> None:
    tokens = torch.arange(2 * 5 * 2, dtype=torch.float32).reshape(2, 5, 2)
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.9, 0.0, 0.05, 0.8]])
    kept = keep_top_tokens(tokens, scores, keep=2)
    assert kept.shape == (2, 3, 2)
    assert torch.equal(kept[:, 0], tokens[:, 0])
    chosen = [{tuple(token) for token in rows[1:].tolist()} for rows in kept]
    assert chosen == [
        {tuple(tokens[0, 2].tolist()), tuple(tokens[0, 4].tolist())},
        {tuple(tokens[1, 1].tolist()), tuple(tokens[1, 4].tolist())},
    ]


def test_pruned_tokens_are_fused_into_one_weighted_by_their_scores() -> None:
    tokens = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]], requires_grad=True)
    scores = torch.tensor([[0.2, 0.1, 0.6]], requires_grad=True)
    kept = keep_top_tokens(tokens, scores, keep=1, fuse=True)
    torch.testing.assert_close(kept, torch.tensor([[[9.0, 9.0], [3.0, 3.0], [0.2, 0.2]]]))
    to_tokens, to_scores = torch.autograd.grad(kept[:, 2].sum(), (tokens, scores))
    torch.testing.assert_close(to_tokens[0, :, 0], torch.tensor([0.0, 0.2, 0.1, 0.0]))
    torch.testing.assert_close(to_scores, torch.tensor([[1.0, 2.0, 0.0]]))


def test_nothing_is_fused_if_all_tokens_are_kept() -> None:
    tokens = torch.rand(2, 4, 3)
    kept = keep_top_tokens(tokens, torch.rand(2, 3), keep=3, fuse=True)
    assert kept.shape == (2, 4, 3)


def test_gradients_reach_only_kept_tokens() -> None:
    tokens = torch.zeros(1, 4, 2, requires_grad=True)
    kept = keep_top_tokens(tokens, torch.tensor([[0.2, 0.5, 0.3]]), keep=1)
    (gradient,) = torch.autograd.grad(kept.sum(), tokens)
    assert gradient[0, :, 0].tolist() == [1, 0, 1, 0]


def test_keep_origins_selects_patch_numbers_like_their_tokens() -> None:
    origins = torch.tensor([[4, 7, 9, FUSED]])
    pruning = Pruning(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), torch.tensor([[3, 1]]))
    assert keep_origins(origins, pruning).tolist() == [[FUSED, 7]]
    assert keep_origins(origins, pruning, fuse=True).tolist() == [[FUSED, 7, FUSED]]
    everything = Pruning(pruning.scores, torch.tensor([[3, 1, 0, 2]]))
    assert keep_origins(origins, everything, fuse=True).tolist() == [[FUSED, 7, 4, 9]]
