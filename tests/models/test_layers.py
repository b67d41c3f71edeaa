from collections.abc import Callable
from functools import partial

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from models.layers import Attention, Block, ConvStem, DropPath, Mlp, PatchEmbed, QuickGELU


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(2))


def spread(module: nn.Module) -> None:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)


def block(skip_divisor: float = 1.0, fuse_pruned: bool = False, drop_path: float = 0.0) -> Block:
    made = Block(
        8,
        2,
        12,
        qkv_bias=True,
        norm_eps=1e-6,
        skip_divisor=skip_divisor,
        drop_path=drop_path,
        fuse_pruned=fuse_pruned,
    )
    spread(made)
    return made.eval()


def test_attention_matches_that_of_torch_for_the_same_weights(tokens: Tensor) -> None:
    attention = Attention(8, 2, qkv_bias=True).eval()
    spread(attention)
    reference = nn.MultiheadAttention(8, 2, batch_first=True)
    reference.load_state_dict(
        {
            "in_proj_weight": attention.qkv.weight,
            "in_proj_bias": attention.qkv.bias,
            "out_proj.weight": attention.proj.weight,
            "out_proj.bias": attention.proj.bias,
        }
    )
    expected, weights = reference(tokens, tokens, tokens)
    out, scores = attention(tokens, with_scores=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores, weights[:, 0, 1:], atol=1e-6, rtol=1e-4)


def test_explicit_and_fused_attention_agree(tokens: Tensor) -> None:
    attention = Attention(8, 2, qkv_bias=False)
    spread(attention)
    explicit, explicit_scores = attention.train()(tokens, with_scores=True)
    fused, fused_scores = attention.eval()(tokens, with_scores=True)
    torch.testing.assert_close(explicit, fused)
    torch.testing.assert_close(explicit_scores, fused_scores)


def test_scores_are_computed_only_on_request(tokens: Tensor) -> None:
    attention = Attention(8, 2, qkv_bias=True)
    assert attention.train()(tokens, with_scores=False)[1] is None
    assert attention.eval()(tokens, with_scores=False)[1] is None


@pytest.mark.parametrize(("keep_rate", "left"), [(1.0, 10), (0.999, 10), (0.7, 8), (0.5, 6), (1e-6, 2)])
def test_a_block_returns_the_class_token_and_the_kept_tokens(tokens: Tensor, keep_rate: float, left: int) -> None:
    assert block()(tokens, keep_rate).shape == (2, left, 8)


def test_a_block_prunes_between_attention_and_mlp(tokens: Tensor) -> None:
    pruning = block()
    attended, scores = pruning.attn(pruning.norm1(tokens), with_scores=True)
    x = tokens + attended
    best = scores[0].argsort(descending=True)[:5] + 1
    kept = torch.cat([x[0, :1], x[0, best]])
    expected = kept + pruning.mlp(pruning.norm2(kept))
    got = pruning(tokens, 0.5)[0]
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1:].sort(dim=0).values, expected[1:].sort(dim=0).values)


def test_the_fused_token_comes_last_and_passes_through_the_mlp(tokens: Tensor) -> None:
    fusing = block(fuse_pruned=True)
    attended, scores = fusing.attn(fusing.norm1(tokens), with_scores=True)
    x = tokens + attended
    dropped = scores[0].argsort(descending=True)[5:]
    fused = (scores[0, dropped, None] * x[0, dropped + 1]).sum(dim=0)
    got = fusing(tokens, 0.5)
    assert got.shape == (2, 7, 8)
    torch.testing.assert_close(got[:, :6], block()(tokens, 0.5))
    torch.testing.assert_close(got[0, 6], fused + fusing.mlp(fusing.norm2(fused)))


def test_the_skip_divisor_divides_both_branches(tokens: Tensor) -> None:
    halved = block(skip_divisor=2.0)
    x = tokens + halved.attn(halved.norm1(tokens), with_scores=False)[0] / 2
    torch.testing.assert_close(halved(tokens, 1.0), x + halved.mlp(halved.norm2(x)) / 2)


def test_drop_path_drops_each_branch_independently(tokens: Tensor) -> None:
    dropping = block(drop_path=0.5).train()
    attended = dropping.attn(dropping.norm1(tokens), with_scores=False)[0]
    outcomes = set()
    for x, branch in zip(tokens.repeat(40, 1, 1).chunk(40), [attended] * 40, strict=True):
        for before, of_attention, after in zip(x, branch, dropping(x, 1.0), strict=True):
            for drops_attention in (True, False):
                middle = before if drops_attention else before + 2 * of_attention  # scaled by 1 / (1 - 0.5)
                whole = middle + 2 * dropping.mlp(dropping.norm2(middle))
                for drops_mlp, expected in ((True, middle), (False, whole)):
                    if torch.allclose(after, expected, atol=1e-5, rtol=1e-4):
                        outcomes.add((drops_attention, drops_mlp))
    assert outcomes == {(False, False), (False, True), (True, False), (True, True)}
    assert torch.equal(dropping.eval()(tokens, 1.0), block()(tokens, 1.0))


def test_the_stem_halves_the_side_and_then_cuts_patches_row_by_row() -> None:
    stem = ConvStem(patch_kernel=4, stem_width=5, width=8).eval()
    spread(stem)
    images = torch.zeros(1, 3, 24, 24)
    plain = stem(images)
    assert plain.shape == (1, 36, 8)
    images[:, :, 9, 18] = 5.0  # in patch row 2, column 4
    changed = (stem(images) != plain).any(dim=2)[0].nonzero().flatten().tolist()
    assert 2 * 6 + 4 in changed
    assert all(index // 6 <= 4 and 3 <= index % 6 <= 5 for index in changed)  # the stem's convolutions see 15 px


@pytest.mark.parametrize(
    ("ours", "timms"),
    [
        (partial(Mlp, 8, 12, QuickGELU), partial(timm.layers.Mlp, 8, 12, act_layer=timm.layers.QuickGELU)),
        (partial(DropPath, 0.4), partial(timm.layers.DropPath, 0.4)),
        (partial(DropPath, 1.0), partial(timm.layers.DropPath, 1.0)),
    ],
)
def test_mlp_and_drop_path_match_those_of_timm(
    tokens: Tensor, ours: Callable[[], nn.Module], timms: Callable[[], nn.Module]
) -> None:
    parts = ours(), timms()
    for part in parts:
        spread(part)
    for is_training in (False, True):
        outputs = []
        for part in parts:
            torch.manual_seed(7)
            outputs.append(part.train(is_training)(tokens))
        assert torch.equal(*outputs)


def test_the_patch_embedding_matches_that_of_timm() -> None:
    ours, timms = PatchEmbed(4, 8), timm.layers.PatchEmbed(None, 4, embed_dim=8)
    timms.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 12, 12)
    assert torch.equal(ours(images), timms(images))
