"""Tiny plain ViTs that timm builds are converted, and their logits compared with those of timm."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

import models.registered  # noqa: F401 - registers the SuperViTs with timm
from models.checkpoint import load_checkpoint
from models.conversion import options as room
from models.conversion.convert import convert, from_plain_vit, open_initial
from models.conversion.plain_vit import PlainViT
from models.files.checkpoint_errors import CheckpointError, CheckpointMismatchError, UnreadableCheckpointError
from models.subnetwork import IMAGENET_MEAN, SubNetwork
from models.supervit import SuperViT

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4, "num_classes": 5}
Convert = partial(room.Convert, num_heads=4)  # heads of 32 channels, which cannot be inferred from the width

# timm's name, the options besides TINY, and whether the weights alone identify the architecture.
TAKEN: dict[str, tuple[str, dict[str, Any], bool]] = {
    "DeiT": ("deit_tiny_patch16_224", {}, True),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", {}, True),
    "DeiT-III": ("deit3_small_patch16_224", {}, True),
    "augreg": ("vit_tiny_patch16_224", {}, True),
    "DINOv2": ("vit_small_patch14_dinov2", {}, True),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {}, True),
    "CLIP": ("vit_base_patch16_clip_224", {}, True),
    "OpenAI's CLIP": ("vit_base_patch16_clip_quickgelu_224", {}, False),
    "no bias of queries": ("vit_tiny_patch16_224", {"qkv_bias": False}, True),
    "mean pooling": ("vit_tiny_patch16_224", {"global_pool": "avg"}, True),
    "another patch kernel": ("vit_tiny_patch16_224", {"patch_size": 2, "img_size": 8}, True),
}


def plain(name: str, **options: Any) -> Any:  # noqa: ANN401 - timm is untyped
    """Build a ViT with noise added to every weight, including biases and LayerScale."""
    torch.manual_seed(5)
    vit = timm.create_model(name, **(TINY | options)).eval()
    with torch.no_grad():
        for weight in vit.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return vit


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def save(vit: nn.Module, folder: Path) -> Path:
    path = folder / "vit.pth"
    torch.save({"model": vit.state_dict()}, path)
    return path


def run_converted(path: Path, folder: Path, images: Tensor, **options: Any) -> Tensor:  # noqa: ANN401 - options
    convert(Convert(vit=path, output=folder / "elastic.safetensors", **options))
    checkpoint = load_checkpoint(folder / "elastic.safetensors")
    with torch.inference_mode():
        logits: Tensor = checkpoint.model(images, checkpoint.config.largest)
    return logits


@pytest.mark.parametrize("kind", TAKEN)
@torch.inference_mode()
def test_a_converted_vit_gives_the_logits_of_timm_at_its_own_grid_and_keep_rate_1(
    tmp_path: Path, images: Tensor, kind: str
) -> None:
    name, options, _ = TAKEN[kind]
    vit = plain(name, **options)
    side = vit.patch_embed.img_size[0]
    initial = from_plain_vit(PlainViT(vit), tmp_path)
    assert initial.config
    model = SuperViT(initial.config).eval()
    initial.load_into(model, with_head=True)
    images = images[..., :side, :side]
    torch.testing.assert_close(model(images), vit(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind, (_, _, is_told) in TAKEN.items() if is_told])
@torch.inference_mode()
def test_a_file_is_converted_from_its_weights_alone(tmp_path: Path, images: Tensor, kind: str) -> None:
    name, options, _ = TAKEN[kind]
    vit = plain(name, **options)
    images = images[..., : vit.patch_embed.img_size[0], : vit.patch_embed.img_size[0]]
    expected = vit(images)
    torch.testing.assert_close(run_converted(save(vit, tmp_path), tmp_path, images), expected, atol=1e-5, rtol=1e-5)


def as_transformers(vit: Any, prefix: str) -> dict[str, Tensor]:  # noqa: ANN401 - timm is untyped
    """Name the weights of timm's ViT as transformers does."""
    parts = [
        ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
        ("attn.proj.", "attention.output.dense."),
        ("ls1.gamma", "layer_scale1.lambda1"),
        ("ls2.gamma", "layer_scale2.lambda1"),
        ("blocks.", "encoder.layer."),
    ]
    weights = {"embeddings.mask_token": torch.zeros(1, 8)}
    for name, weight in vit.state_dict().items():
        if ".attn.qkv." in name:
            for part, tensor in zip(("query", "key", "value"), weight.chunk(3), strict=True):
                other = name.replace("attn.qkv.", f"attention.attention.{part}.").replace("blocks.", "encoder.layer.")
                weights[other] = tensor
            continue
        renamed = name
        for timms, theirs in parts:
            renamed = renamed.replace(timms, theirs)
        renamed = "layernorm." + renamed.removeprefix("norm.") if renamed.startswith("norm.") else renamed
        weights[renamed] = weight
    token, position = weights.pop("cls_token"), weights.pop("pos_embed")
    if (registers := weights.pop("reg_token", None)) is not None:
        weights["embeddings.register_tokens"] = registers
        position = torch.cat([torch.full_like(token, 0.25), position], dim=1)
        token = token - 0.25
    weights |= {"embeddings.cls_token": token, "embeddings.position_embeddings": position}
    head = {name.replace("head.", "classifier."): weights.pop(name) for name in ("head.weight", "head.bias")}
    return {prefix + name: tensor for name, tensor in weights.items()} | head


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
@torch.inference_mode()
def test_the_layout_of_transformers_is_converted(tmp_path: Path, images: Tensor, name: str) -> None:
    vit = plain(name)
    torch.save(as_transformers(vit, "dinov2."), tmp_path / "vit.pth")
    logits = run_converted(tmp_path / "vit.pth", tmp_path, images)
    torch.testing.assert_close(logits, vit(images), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_every_sub_network_of_a_converted_vit_runs(tmp_path: Path, images: Tensor) -> None:
    vit = plain("vit_small_patch14_reg4_dinov2")
    convert(Convert(vit=save(vit, tmp_path), output=tmp_path / "elastic.safetensors", patch_grids=(2, 3, 4)))
    checkpoint = load_checkpoint(tmp_path / "elastic.safetensors")
    assert checkpoint.config.prune_blocks == (1, 2, 3)
    assert checkpoint.class_names == tuple(f"class {index}" for index in range(5))
    answers = [checkpoint.model(images, subnetwork) for subnetwork in checkpoint.config.subnetworks]
    assert len(answers) == 9
    assert all(answer.shape == (3, 5) and answer.isfinite().all() for answer in answers)


def test_position_embeddings_and_patch_kernels_are_resampled_as_by_timm(tmp_path: Path) -> None:
    vit = plain("vit_small_patch14_dinov2")
    output = tmp_path / "elastic.safetensors"
    convert(Convert(vit=save(vit, tmp_path), output=output, patch_kernel=6, patch_grids=(3, 5)))
    model = load_checkpoint(output).model
    resampled = resample_patch_embed(vit.patch_embed.proj.weight, [6, 6])
    assert torch.equal(model.state_dict()["patch_embed.proj.weight"], resampled)
    for index, grid in enumerate((3, 5)):
        expected = resample_abs_pos_embed(vit.pos_embed, [grid, grid])
        torch.testing.assert_close(model.pos_embed_list[index], expected)


def test_the_preprocessing_comes_from_timms_configuration_or_from_the_options(tmp_path: Path) -> None:
    path, output = save(plain("vit_tiny_patch16_224"), tmp_path), tmp_path / "elastic.safetensors"
    nameless = convert(Convert(vit=path, output=output))
    assert nameless.mean == IMAGENET_MEAN
    named = convert(
        room.Convert(
            vit=save(timm.create_model("vit_tiny_patch16_224"), tmp_path),
            output=output,
            name="vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        )
    )
    assert (named.mean, named.std, named.crop_fraction) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.9)
    assert load_checkpoint(output).config.mean == (0.5, 0.5, 0.5)
    assert load_checkpoint(output).class_names[1] == "goldfish, Carassius auratus"
    path = save(plain("vit_tiny_patch16_224"), tmp_path)
    given = convert(Convert(vit=path, output=output, mean=(0.1, 0.2, 0.3), interpolation="bilinear"))
    assert (given.mean, given.interpolation) == ((0.1, 0.2, 0.3), "bilinear")


def test_a_vit_without_a_head_gets_a_zero_head_that_fits_no_data_set(tmp_path: Path, images: Tensor) -> None:
    vit = plain("vit_small_patch14_dinov2", num_classes=0)
    logits = run_converted(save(vit, tmp_path), tmp_path, images)
    assert logits.tolist() == [[0.0]] * 3
    assert not open_initial(tmp_path / "elastic.safetensors").has_head_for(("blue",))


def tiny_lvvit() -> Any:  # noqa: ANN401 - timm is untyped
    torch.manual_seed(2)
    return timm.create_model(
        "supervit_lvvit_small_patch16_224",
        width=64, num_heads=1, depth=16, patch_kernel=4, patch_grids=(4,), num_classes=5, stem_width=8,
    )  # fmt: skip


def plain_lvvit() -> dict[str, Tensor]:
    """Return the weights of `tiny_lvvit` in the layout of its authors."""
    weights = tiny_lvvit().state_dict()
    return {name.replace("pos_embed_list.0", "pos_embed"): weight for name, weight in weights.items()}


@torch.inference_mode()
def test_an_lvvit_in_the_layout_of_its_authors_adds_half_of_the_auxiliary_logits(tmp_path: Path) -> None:
    lvvit = tiny_lvvit()
    torch.save(plain_lvvit(), tmp_path / "lvvit.pth")
    convert(room.Convert(vit=tmp_path / "lvvit.pth", output=tmp_path / "elastic.safetensors"))
    checkpoint = load_checkpoint(tmp_path / "elastic.safetensors")
    images = torch.randn(2, 3, 16, 16)
    tokens = lvvit.eval().norm(lvvit.transform(lvvit.embed(images, 4), 1.0, 0, 16))
    expected = lvvit.head(tokens[:, 0]) + 0.5 * lvvit.aux_head(tokens[:, 1:]).amax(dim=1)
    torch.testing.assert_close(checkpoint.model(images, SubNetwork(4, 1.0)), expected, atol=1e-5, rtol=1e-5)


def test_an_lvvit_without_heads_is_converted_without_a_head(tmp_path: Path, images: Tensor) -> None:
    weights = plain_lvvit()
    torch.save({name: weight for name, weight in weights.items() if "head" not in name}, tmp_path / "lvvit.pth")
    convert(room.Convert(vit=tmp_path / "lvvit.pth", output=tmp_path / "elastic.safetensors"))
    checkpoint = load_checkpoint(tmp_path / "elastic.safetensors")
    assert checkpoint.class_names == ("untrained",)
    assert checkpoint.model(images, SubNetwork(4, 1.0)).tolist() == [[0.0]] * len(images)


@pytest.mark.parametrize("name", ["cls_token", "blocks.0.mlp.fc1.weight", "patch_embed.proj.weight"])
def test_an_incomplete_lvvit_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    weights = plain_lvvit()
    del weights[name]
    torch.save(weights, tmp_path / "lvvit.pth")
    with pytest.raises(CheckpointMismatchError, match=f"lvvit.pth: an LV-ViT without {name}$"):
        convert(room.Convert(vit=tmp_path / "lvvit.pth", output=tmp_path / "elastic.safetensors"))


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("vit_base_patch16_siglip_gap_224", "no class token"),
        ("vit_base_patch16_siglip_224", "attention pooling"),
        ("eva02_tiny_patch14_224", r"the attention of EVA or BEiT \(RoPE"),
        ("vit_little_patch16_reg4_gap_256", "no class token"),
        ("vit_small_patch16_rope_224", "no position embedding, as with RoPE"),
        ("beit_base_patch16_224", "relative position bias"),
        ("swin_tiny_patch4_window7_224", "attention within windows"),
        ("vit_relpos_small_patch16_224", "relative position bias"),
    ],
)
def test_an_architecture_that_supervit_does_not_support_is_refused_with_the_feature(
    tmp_path: Path, name: str, feature: str
) -> None:
    with torch.device("meta"):
        names = timm.create_model(name).state_dict()
    torch.save(dict.fromkeys(names, torch.zeros(1)), tmp_path / "vit.pth")
    with pytest.raises(CheckpointMismatchError, match=f"vit.pth: has {feature}"):
        convert(Convert(vit=tmp_path / "vit.pth", output=tmp_path / "elastic.safetensors"))
    assert not (tmp_path / "elastic.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ({"qk_norm": True}, "normalised queries and keys"),
        ({"mlp_layer": partial(timm.layers.SwiGLUPacked)}, "SwiGLU"),
        ({"block_fn": timm.models.vision_transformer.ParallelScalingBlock}, "parallel or post-norm blocks"),
        ({"act_layer": "relu"}, "a different activation"),
        ({"global_pool": "max"}, "max pooling"),
        ({"global_pool": "avg", "fc_norm": False}, "no norm directly before its head"),
        ({"embed_norm_layer": nn.LayerNorm}, "a different patch embedding"),
        ({"img_size": (16, 8)}, "patches that do not form a square"),
    ],
)
def test_a_timm_model_with_unsupported_parts_is_refused(tmp_path: Path, options: dict[str, Any], feature: str) -> None:
    with pytest.raises(CheckpointMismatchError, match=f"has {feature}, which SuperViT does not support"):
        from_plain_vit(PlainViT(plain("vit_tiny_patch16_224", **options)), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "no_such_model"}, "no_such_model: unknown timm model"),
        ({"name": "resnet18"}, "resnet18: not a plain ViT"),
        ({"name": "vit_small_patch16_224"}, "its weights do not match vit_small_patch16_224"),
        ({"patch_grids": (3, 2)}, "patch grids must ascend"),
        ({"prune_blocks": (9,)}, "prune blocks"),
    ],
)
def test_options_that_contradict_the_weights_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = save(plain("vit_tiny_patch16_224"), tmp_path)
    with pytest.raises(CheckpointError, match=message):
        convert(Convert(vit=path, output=tmp_path / "elastic.safetensors", **options))


def test_weights_of_another_network_and_missing_files_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointMismatchError, match="not the weights of a plain ViT"):
        open_initial(tmp_path / "other.pth")
    with pytest.raises(UnreadableCheckpointError, match="no such file"):
        open_initial(tmp_path / "absent.pth")


def test_the_number_of_heads_must_be_given_if_the_width_does_not_imply_it(tmp_path: Path, images: Tensor) -> None:
    path = save(plain("vit_tiny_patch16_224"), tmp_path)
    with pytest.raises(CheckpointMismatchError, match=r"cannot infer the number of heads for width 128; give --num"):
        convert(room.Convert(vit=path, output=tmp_path / "elastic.safetensors"))
    common = plain("vit_tiny_patch16_224", embed_dim=192, num_heads=3)
    convert(room.Convert(vit=save(common, tmp_path), output=tmp_path / "elastic.safetensors"))
    checkpoint = load_checkpoint(tmp_path / "elastic.safetensors")
    assert checkpoint.config.num_heads == 3
    with torch.inference_mode():
        torch.testing.assert_close(checkpoint.model(images), common(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("file_of", "name"),
    [("deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"), ("vit_tiny_patch16_224", "vit_small_patch32_224")],
)
def test_a_name_that_the_weights_contradict_is_refused(tmp_path: Path, file_of: str, name: str) -> None:
    torch.save(timm.create_model(file_of).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(CheckpointMismatchError, match=f"its weights do not match {name}: "):
        convert(room.Convert(vit=tmp_path / "vit.pth", output=tmp_path / "elastic.safetensors", name=name))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (
            ("embeddings.cls_token", "embeddings.register_tokens", "embeddings.patch_embeddings.weight"),
            "no position emb",
        ),
        (
            ("embeddings.cls_token", "encoder.layer.0.attention.attention.query.weight"),
            "queries, keys or values are missing",
        ),
        (("embeddings.cls_token", "encoder.layer.0.mlp.weights_in.weight"), "has SwiGLU"),
        (("vision_model.encoder.layers.0.self_attn.q_proj.weight",), "has the layout of transformers' CLIP, which"),
    ],
)
def test_unsupported_layouts_of_transformers_are_refused(tmp_path: Path, names: tuple[str, ...], reason: str) -> None:
    torch.save({name: torch.zeros(1, 4, 8) for name in names}, tmp_path / "vit.pth")
    with pytest.raises(CheckpointMismatchError, match=reason):
        open_initial(tmp_path / "vit.pth")


def test_weights_that_are_not_finite_and_an_output_over_the_input_are_refused(tmp_path: Path) -> None:
    vit = plain("vit_tiny_patch16_224")
    with torch.no_grad():
        vit.norm.weight[3] = torch.nan
    with pytest.raises(CheckpointMismatchError, match=r"1 weights are not finite, such as 'norm\.weight'"):
        convert(Convert(vit=save(vit, tmp_path), output=tmp_path / "elastic.safetensors"))
    path = save(plain("vit_tiny_patch16_224"), tmp_path)
    with pytest.raises(CheckpointMismatchError, match="the output must not overwrite the input"):
        convert(Convert(vit=path, output=path))


def test_a_thousand_classes_count_as_imagenet_for_serving_and_as_any_classes_for_training(tmp_path: Path) -> None:
    path = save(plain("vit_tiny_patch16_224", num_classes=1000), tmp_path)
    convert(Convert(vit=path, output=tmp_path / "elastic.safetensors"))
    assert load_checkpoint(tmp_path / "elastic.safetensors").class_names[1] == "goldfish, Carassius auratus"
    assert open_initial(path, num_heads=4).has_head_for(tuple(f"n{index:08d}" for index in range(1000)))
