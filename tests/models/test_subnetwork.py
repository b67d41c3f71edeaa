import pytest

from models.subnetwork import SubNetwork, SuperViTConfig, num_kept_patch_tokens

# Tokens of the published family before any block prunes and after each of the three that prune, worked by hand.
TOKENS = {
    (8, 0.5): (65, 34, 18, 10),
    (8, 0.7): (65, 47, 34, 25),
    (8, 1.0): (65, 65, 65, 65),
    (10, 0.5): (101, 52, 27, 15),
    (10, 0.7): (101, 72, 52, 38),
    (10, 1.0): (101, 101, 101, 101),
    (12, 0.5): (145, 74, 38, 20),
    (12, 0.7): (145, 103, 74, 53),
    (12, 1.0): (145, 145, 145, 145),
    (14, 0.5): (197, 100, 51, 27),
    (14, 0.7): (197, 139, 99, 71),
    (14, 1.0): (197, 197, 197, 197),
}


def test_the_published_family_is_every_grid_with_every_keep_rate() -> None:
    family = SuperViTConfig().subnetworks
    assert [(sub.patch_grid, sub.keep_rate) for sub in family] == list(TOKENS)
    assert SuperViTConfig().largest == family[-1] == SubNetwork(14, 1.0)


@pytest.mark.parametrize(("shape", "expected"), TOKENS.items())
@pytest.mark.parametrize("depth", [12, 16])
def test_tokens_per_block_match_hand_worked_numbers(
    shape: tuple[int, float], expected: tuple[int, ...], depth: int
) -> None:
    subnetwork = SubNetwork(*shape)
    a, b, c, d = expected
    config = SuperViTConfig(depth=depth)
    counts = config.tokens_per_block(subnetwork)
    assert counts[:10] == ((a, a), (a, a), (a, a), (a, b), (b, b), (b, b), (b, c), (c, c), (c, c), (c, d))
    assert counts[10:] == ((d, d),) * (depth - 10)
    assert config.num_tokens(subnetwork) == a


@pytest.mark.parametrize(
    ("num_patch_tokens", "keep_rate", "kept"),
    [(196, 0.5, 99), (196, 0.7, 138), (196, 0.999, 196), (196, 1e-6, 1), (1, 0.5, 1), (9, 0.35, 4)],
)
def test_a_prune_block_rounds_the_kept_tokens_up_and_keeps_at_least_one_and_at_most_all(
    num_patch_tokens: int, keep_rate: float, kept: int
) -> None:
    assert num_kept_patch_tokens(num_patch_tokens, keep_rate) == kept


def test_prefix_tokens_are_never_pruned_and_do_not_change_how_many_patch_tokens_are_kept() -> None:
    config = SuperViTConfig(num_prefix_tokens=5)
    counts = config.tokens_per_block(SubNetwork(14, 0.5))
    assert config.num_tokens(SubNetwork(14, 0.5)) == 201
    assert [mlp for _, mlp in counts[3::3]] == [5 + 99, 5 + 50, 5 + 26]


def test_a_block_that_prunes_adds_one_fused_token() -> None:
    config = SuperViTConfig(depth=4, prune_blocks=(1, 3), patch_grids=(4,), keep_rates=(0.5,), fuse_pruned=True)
    # 17 tokens: ceil(8.5) = 9 of 16 patch tokens stay, with the class token and the fused one 11; of those 6, so 8.
    assert config.tokens_per_block(config.largest) == ((17, 17), (17, 11), (11, 11), (11, 8))
    # At 0.99 all 16 stay: there is nothing to fuse.
    assert config.tokens_per_block(SubNetwork(4, 0.99))[1] == (17, 17)
    assert config.tokens_per_block(SubNetwork(4, 1.0)) == ((17, 17),) * 4


def test_the_largest_subnetwork_has_the_largest_grid_and_the_highest_keep_rate() -> None:
    assert SuperViTConfig().largest == SubNetwork(14, 1.0)
    assert SuperViTConfig(keep_rates=(0.5, 0.7)).largest == SubNetwork(14, 0.7)


def test_a_coarser_grid_has_larger_patches() -> None:
    config = SuperViTConfig()
    sizes = [config.patch_size_px(SubNetwork(grid, 1.0)) for grid in config.patch_grids]
    assert sizes == pytest.approx([28, 22.4, 56 / 3, 16])
    assert config.image_side == 224
    assert config.mlp_width == 1536


def test_a_subnetwork_is_hashable_ordered_and_printable() -> None:
    assert {SubNetwork(10, 0.7): "row"}[SubNetwork(10, 0.7)] == "row"
    assert SubNetwork(8, 1.0) < SubNetwork(10, 0.5) < SubNetwork(10, 0.7)
    assert str(SubNetwork(10, 0.7)) == "grid 10 at keep rate 0.7"


@pytest.mark.parametrize(
    ("grid", "rate", "reason"),
    [
        (0, 1.0, "patch grid must be at least 1"),
        (8, 0.0, "keep rate must be in"),
        (8, 1.01, "keep rate must be in"),
        (8, float("nan"), "keep rate must be in"),
    ],
)
def test_a_subnetwork_out_of_range_is_refused(grid: int, rate: float, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SubNetwork(grid, rate)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"flavour": "swin"}, "flavour must be one of deit, lvvit, not 'swin'"),
        ({"width": 0}, "width must be at least 1"),
        ({"depth": 0, "prune_blocks": ()}, "depth must be at least 1"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"patch_kernel": -1}, "patch_kernel must be at least 1"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"stem_width": 0}, "stem_width must be at least 1"),
        ({"width": 385}, "width 385 is not a multiple of 6 heads"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio must be"),
        ({"mlp_ratio": 1e-9}, "mlp_ratio must be"),
        ({"flavour": "lvvit", "patch_kernel": 5}, "even patch kernel"),
        ({"patch_grids": ()}, "patch grids must ascend"),
        ({"patch_grids": (8, 8)}, "patch grids must ascend"),
        ({"patch_grids": (1, 8)}, "patch grids must ascend"),
        ({"keep_rates": ()}, "keep rates must ascend"),
        ({"keep_rates": (0.5, 1.1)}, "keep rates must ascend"),
        ({"keep_rates": (0.0, 1.0)}, "keep rates must ascend"),
        ({"keep_rates": (0.7, 0.5, 1.0)}, "keep rates must ascend"),
        ({"prune_blocks": (3, 12)}, "prune blocks"),
        ({"prune_blocks": (-1,)}, "prune blocks"),
        ({"mean": (0.5, 0.5)}, "mean and std"),
        ({"std": (0.2, 0.2, 0.0)}, "mean and std"),
        ({"std": (0.2, 0.2, float("nan"))}, "mean and std"),
        ({"mean": (0.2, float("inf"), 0.2)}, "mean and std"),
        ({"crop_fraction": 0.0}, "crop_fraction"),
        ({"crop_fraction": 1.1}, "crop_fraction"),
        ({"pooling": "max"}, "pooling must be one of class, distilled, mean, not 'max'"),
        ({"activation": "relu"}, "activation must be one of"),
        ({"interpolation": "nearest"}, "interpolation must be one of"),
        ({"num_prefix_tokens": 0}, "num_prefix_tokens must be at least 1"),
        ({"pooling": "distilled"}, "needs at least two prefix tokens"),
        ({"flavour": "lvvit", "num_prefix_tokens": 2}, "an lvvit must have one prefix token"),
        ({"flavour": "lvvit", "pre_norm": True}, "an lvvit must have one prefix token"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"aux_head_weight": float("nan")}, "aux_head_weight"),
    ],
)
def test_a_contradictory_config_is_refused_with_its_reason(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SuperViTConfig(**fields)  # type: ignore[arg-type] # wrong values are the point


def test_only_the_lvvit_stem_needs_an_even_patch_kernel() -> None:
    assert SuperViTConfig(patch_kernel=5).image_side == 70
