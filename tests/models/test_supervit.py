import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import models.registered  # noqa: F401 - registers the SuperViTs with timm
from models.subnetwork import SubNetwork, SuperViTConfig, num_kept_patch_tokens
from models.supervit import DEIT_SMALL, LVVIT_MICRO, LVVIT_SMALL, SuperViT
from models.tokens import FUSED


@pytest.mark.parametrize("config", [DEIT_SMALL, LVVIT_SMALL], ids=["deit", "lvvit"])
def test_all_twelve_subnetworks_give_the_reference_logits(
    config: SuperViTConfig,
    drawn_weights: Callable[[SuperViTConfig], dict[str, Tensor]],
    parity_images: Tensor,
    parity_logits: dict[str, Tensor],
) -> None:
    with torch.device("meta"):
        model = SuperViT(config).eval()
    model.load_state_dict(drawn_weights(config), assign=True)
    for subnetwork, expected in zip(config.subnetworks, parity_logits[config.flavour], strict=True):
        with torch.inference_mode():
            logits = model(parity_images, subnetwork)
        difference = (logits[:, parity_logits["classes"]] - expected).abs().max().item()
        assert difference < 1e-4, subnetwork


@pytest.mark.parametrize(("config", "millions"), [(DEIT_SMALL, 22.17), (LVVIT_SMALL, 26.27)], ids=["deit", "lvvit"])
def test_the_published_backbones_have_the_published_number_of_parameters(
    config: SuperViTConfig, millions: float
) -> None:
    with torch.device("meta"):
        model = SuperViT(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions


def test_training_and_inference_paths_agree(model: SuperViT, config: SuperViTConfig, images: Tensor) -> None:
    for subnetwork in config.subnetworks:
        with torch.no_grad():
            (fused,) = model.eval().forward_rates(images, subnetwork.patch_grid, (subnetwork.keep_rate,))
            model.train().patch_embed.eval()  # a stem in training would normalise by the batch
            (explicit,) = model.forward_rates(images, subnetwork.patch_grid, (subnetwork.keep_rate,))
        torch.testing.assert_close(explicit, fused, atol=1e-5, rtol=1e-4)


def test_the_auxiliary_head_contributes_to_the_logits_only_outside_training(model: SuperViT, images: Tensor) -> None:
    (tokens,) = model.forward_rates(images, 3, (0.7,))
    normed = model.norm(tokens)
    of_class = model.head(normed[:, 0])
    torch.testing.assert_close(model.train().classify(tokens), of_class)
    others = 0.0 if model.aux_head is None else 0.25 * model.aux_head(normed[:, 1:]).max(dim=1).values
    torch.testing.assert_close(model.eval().classify(tokens), of_class + others)


@pytest.mark.parametrize("training", [True, False])
def test_forward_rates_gives_the_logits_of_one_forward_pass_per_keep_rate(
    model: SuperViT, config: SuperViTConfig, images: Tensor, training: bool
) -> None:
    model.train(training).patch_embed.eval()
    for subnetwork in (*config.subnetworks, SubNetwork(3, 0.2)):
        grid, rate = subnetwork.patch_grid, subnetwork.keep_rate
        full, pruned = model.forward_rates(images, grid, (1.0, rate))
        torch.testing.assert_close(model.classify(full), model(images, SubNetwork(grid, 1.0)))
        torch.testing.assert_close(model.classify(pruned), model(images, subnetwork))


def test_all_keep_rates_of_a_model_without_prune_blocks_give_the_same_tokens(
    tiny_config: SuperViTConfig, build: Callable[[SuperViTConfig], SuperViT], images: Tensor
) -> None:
    full, pruned = build(replace(tiny_config, prune_blocks=())).forward_rates(images, 3, (1.0, 0.5))
    assert torch.equal(full, pruned)


def test_forward_keeps_no_state_between_subnetworks(model: SuperViT, config: SuperViTConfig, images: Tensor) -> None:
    with torch.inference_mode():
        alone = {subnetwork: model(images, subnetwork) for subnetwork in config.subnetworks}
        for subnetwork in reversed(config.subnetworks):
            model(images, config.largest)
            assert torch.equal(model(images, subnetwork), alone[subnetwork])
    answers = list(alone.values())
    assert all(not torch.allclose(answers[0], other) for other in answers[1:])


def test_the_largest_subnetwork_is_the_default(model: SuperViT, config: SuperViTConfig, images: Tensor) -> None:
    assert torch.equal(model(images), model(images, config.largest))


def test_an_image_gets_the_same_logits_alone_and_in_a_batch(
    model: SuperViT, config: SuperViTConfig, images: Tensor
) -> None:
    with torch.inference_mode():
        for subnetwork in config.subnetworks:
            together = model(images, subnetwork)
            alone = torch.cat([model(image[None], subnetwork) for image in images])
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keep_rate", [0.33, 0.999, 1e-6])
def test_any_keep_rate_runs_at_every_grid(
    model: SuperViT, config: SuperViTConfig, images: Tensor, keep_rate: float
) -> None:
    for grid in config.patch_grids:
        logits = model(images, SubNetwork(grid, keep_rate))
        assert logits.shape == (4, 3)
        assert logits.isfinite().all()


def test_blocks_process_as_many_tokens_as_tokens_per_block_states(
    model: SuperViT, config: SuperViTConfig, images: Tensor
) -> None:
    seen: list[tuple[int, int]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].shape[1], out.shape[1])))
    for subnetwork in (*config.subnetworks, SubNetwork(4, 0.33), SubNetwork(2, 1e-6)):
        seen.clear()
        model(images, subnetwork)
        assert tuple(seen) == config.tokens_per_block(subnetwork)


def test_images_are_resized_to_the_grid_with_aligned_corners(
    model: SuperViT, config: SuperViTConfig, images: Tensor
) -> None:
    resized = functional.interpolate(images, (8, 8), mode="bilinear", align_corners=True)
    patches = model.patch_embed(resized)
    tokens = model.embed(images, 2)
    torch.testing.assert_close(tokens[:, 1:], patches + model.pos_embed_list[0][:, 1:])
    torch.testing.assert_close(tokens[:, :1], (model.cls_token + model.pos_embed_list[0][:, :1]).expand(4, -1, -1))
    largest = model.embed(images, config.patch_grids[-1])
    torch.testing.assert_close(largest[:, 1:], model.patch_embed(images) + model.pos_embed_list[2][:, 1:])


def test_an_untrained_grid_is_refused(model: SuperViT, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"patch grid 5 was not trained; it must be one of \(2, 3, 4\)"):
        model(images, SubNetwork(5, 1.0))


@pytest.mark.parametrize("shape", [(1, 3, 16, 12), (1, 3, 12, 12), (1, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_shape_are_refused(model: SuperViT, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 16, 16\)"):
        model(torch.zeros(shape))


class ShapeRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's __init_subclass__
    """Collect the shape of everything that any operator returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - torch's signature
        del types
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.shapes.add(tuple(value.shape))
        return result


def attention_matrices(model: SuperViT, images: Tensor, subnetwork: SubNetwork) -> set[tuple[int, ...]]:
    """Return the shapes met that hold an (N, N) matrix per image and head, for a token count N of the sub-network."""
    counts = {count for pair in model.config.tokens_per_block(subnetwork) for count in pair}
    matrices = len(images) * model.config.num_heads
    with ShapeRecorder() as recorder, torch.inference_mode():
        model(images, subnetwork)
    return {
        shape
        for shape in recorder.shapes
        if any(shape[-2:] == (count, count) and math.prod(shape) == matrices * count**2 for count in counts)
    }


def test_inference_never_materialises_an_attention_matrix(
    config: SuperViTConfig, build: Callable[[SuperViTConfig], SuperViT], images: Tensor
) -> None:
    model = build(replace(config, width=36))  # a head is 18 wide, which is no token count: those are at most 17
    for subnetwork in config.subnetworks:
        assert attention_matrices(model, images, subnetwork) == set()
    assert attention_matrices(model.train(), images, config.largest)  # those of the training path are recorded


def test_weight_decay_excludes_the_class_token_and_the_position_embeddings(model: SuperViT) -> None:
    assert model.no_weight_decay() == {"cls_token", "pos_embed_list.0", "pos_embed_list.1", "pos_embed_list.2"}
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


def test_patch_projections_are_initialised_at_the_scale_of_their_flavour(config: SuperViTConfig) -> None:
    """A DeiT's projection is a linear layer, scaled by its fan-in as in timm; the stem's is scaled by its fan-out."""
    torch.manual_seed(0)
    projection = SuperViT(replace(config, width=128, stem_width=64)).patch_embed.get_parameter("proj.weight")
    width, channels, side, _ = projection.shape
    expected = (3 * channels * side**2) ** -0.5 if config.flavour == "deit" else (2 / (width * side**2)) ** 0.5
    assert projection.std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("config", "eps"), [(DEIT_SMALL, 1e-6), (LVVIT_SMALL, 1e-5)], ids=["deit", "lvvit"])
def test_every_norm_has_the_published_epsilon(config: SuperViTConfig, eps: float) -> None:
    with torch.device("meta"):
        norms = [module for module in SuperViT(config).modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * config.depth + 1
    assert {norm.eps for norm in norms} == {eps}


def test_drop_path_grows_linearly_to_the_last_block(config: SuperViTConfig) -> None:
    model = SuperViT(config, drop_path_rate=0.2)
    assert [block.get_submodule("drop_path").drop_prob for block in model.blocks] == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("supervit_deit_small_patch16_224", DEIT_SMALL),
        ("supervit_lvvit_small_patch16_224", LVVIT_SMALL),
        ("supervit_lvvit_micro_patch4_32", LVVIT_MICRO),
    ],
)
def test_timm_builds_every_registered_model(name: str, config: SuperViTConfig) -> None:
    model = timm.create_model(name, depth=config.prune_blocks[-1] + 1, num_classes=7, drop_path_rate=0.1)
    assert isinstance(model, SuperViT)
    assert model.config == replace(config, depth=config.prune_blocks[-1] + 1, num_classes=7)
    side = config.image_side
    with torch.inference_mode():
        assert model.eval()(torch.zeros(1, 3, side, side), config.subnetworks[0]).shape == (1, 7)


def test_asking_timm_for_pretrained_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="no pretrained weights are available"):
        timm.create_model("supervit_lvvit_micro_patch4_32", pretrained=True)


@pytest.mark.parametrize("fuse_pruned", [False, True])
def test_a_trace_has_the_logits_of_forward_and_keeps_as_many_patches_as_tokens_per_block_states(
    config: SuperViTConfig, build: Callable[[SuperViTConfig], SuperViT], images: Tensor, fuse_pruned: bool
) -> None:
    prefix = 3 if config.flavour == "deit" else 1  # an lvvit has one prefix token
    model = build(replace(config, fuse_pruned=fuse_pruned, num_prefix_tokens=prefix))
    for subnetwork in (*config.subnetworks, SubNetwork(4, 0.33)):
        logits, traces = model.trace(images, subnetwork)
        torch.testing.assert_close(logits, model(images, subnetwork))
        assert [trace.block for trace in traces] == ([1, 2] if subnetwork.keep_rate < 1 else [])
        counts = model.config.tokens_per_block(subnetwork)
        alive = [set(range(subnetwork.patch_grid**2)) for _ in images]
        for trace in traces:
            before, after = (count - prefix for count in counts[trace.block])
            num_kept = num_kept_patch_tokens(before, subnetwork.keep_rate)
            assert after == num_kept + (fuse_pruned and num_kept < before)
            assert trace.kept.shape == trace.scores.shape == (len(images), num_kept)
            for index, row in enumerate(trace.kept.tolist()):
                patches = [patch for patch in row if patch != FUSED]
                assert len(set(patches)) == len(patches) >= len(row) - fuse_pruned
                assert set(patches) <= alive[index]
                alive[index] = set(patches)


def looking_at(patches: tuple[int, ...], config: SuperViTConfig) -> SuperViT:
    """Build a model whose class token attends to `patches` of the largest grid, most of all to the first.

    Attention reads its keys from one channel, which only the position embeddings fill. The values and the MLP add
    nothing.
    """
    model = SuperViT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
            norm.weight.fill_(1)
        for block in model.blocks:
            qkv = block.get_submodule("attn.qkv")
            qkv.get_parameter("bias")[: config.width] = 1.0  # every query is the same
            qkv.get_parameter("weight")[config.width : 2 * config.width, 0] = 5.0
        positions = model.pos_embed_list[-1]
        positions[0, :, 1] = 1.0  # else the norm would scale small values up to the same size for every token
        for rank, patch in enumerate(patches):
            positions[0, config.num_prefix_tokens + patch, 0] = 3.0 - rank
    return model


def test_a_trace_lists_the_patches_that_the_class_token_attends_to(tiny_config: SuperViTConfig) -> None:
    config = replace(tiny_config, num_prefix_tokens=2)
    model = looking_at((9, 2, 14), config)
    _, (first, second) = model.trace(torch.zeros(1, 3, 16, 16), SubNetwork(4, 0.17))
    assert (first.block, second.block) == (1, 2)
    assert set(first.kept[0].tolist()) == {9, 2, 14}  # ceil(0.17 * 17)
    assert second.kept.tolist() == [[9]]  # ceil(0.17 * 4)
    by_patch = dict(zip(first.kept[0].tolist(), first.scores[0].tolist(), strict=True))
    assert by_patch[9] > by_patch[2] > by_patch[14]
