"""Plain vision transformers as other libraries save them: loaded into timm's module, or refused for what they contain.

Supported are timm's own layouts (DeiT with and without distillation, DeiT-III, augreg, DINOv2, CLIP), transformers' ViT
and DINOv2, OpenAI's and DINOv2's own, and an ONNX export of any of them. A file does not say everything. Unless timm's
name of the architecture says otherwise, heads are assumed to be 64 wide at the common widths, norms to precede
attention and MLP, and MLPs to use exact GELU.
"""

import math
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from models.files.checkpoint_errors import CheckpointMismatchError, UnreadableCheckpointError

HEAD_DIM = 64
NAME_IT = "run `supervit convert` with --name"
# Widths at which every published ViT has heads of 64; at others they differ, as 80 in a ViT-H.
COMMON_WIDTHS = (192, 384, 512, 768, 1024)
CLIP_EPS = 1e-5

# Features that no plain ViT has, with patterns of the weight names that reveal them.
FEATURES = {
    "attention within windows": r"^(layers|stages)\.\d+\.(blocks|downsample)",
    "rotary position embedding (RoPE)": r"rope|rotary|freqs",
    "relative position bias": r"relative_position|rel_pos",
    "the attention of EVA or BEiT (RoPE, relative position bias)": r"attn\.q_bias",
    "SwiGLU": r"mlp\.(w12|w3|fc1_g|fc1_x|weights_in)\.",
    "the layout of transformers' CLIP": r"self_attn\.q_proj\.",
    "normalised queries and keys": r"attn\.(q_norm|k_norm)\.",
    "attention pooling": r"attn_pool\.|^head\.probe|attentionpool",
}

# Patterns of transformers' weight names, and timm's names for the same weights.
RENAMED = (
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.register_tokens", "register_tokens"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.(norm1|layernorm_before)\.", ".norm1."),
    (r"\.(norm2|layernorm_after)\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^embeddings\.distillation_token", "dist_token"),
    (r"^distillation_classifier\.", "head_dist."),
    (r"^(cls_)?classifier\.", "head."),
)
QUERY_KEY_VALUE = tuple(f"attention.attention.{part}." for part in ("query", "key", "value"))


@dataclass(frozen=True, slots=True)
class PlainViT:
    """A plain vision transformer, which has a single cost.

    Attributes:
        module: the timm module, in eval mode.
        preprocessing: fields of SuperViTConfig about images; empty where they are unknown.
        has_head: whether the file had a classifier's weights.
    """

    module: VisionTransformer
    preprocessing: dict[str, Any] = field(default_factory=dict)
    has_head: bool = True


def is_lvvit(weights: dict[str, Tensor]) -> bool:
    """Return whether weights have LV-ViT's own layout, a SuperViT's except for its single position embedding."""
    return "patch_embed.conv1.weight" in weights and "pos_embed" in weights


def build_plain_vit(path: Path, weights: dict[str, Tensor], name: str | None, num_heads: int | None) -> PlainViT:
    """Load weights into a timm module.

    Args:
        path: the file, for messages.
        weights: in any layout that this module supports.
        name: timm's name of the architecture, with or without a tag; None to infer the architecture from the weights.
        num_heads: attention heads, where neither the name nor the width determines them; None otherwise.

    Raises:
        CheckpointMismatchError: the weights are not those of a plain ViT, or not those of `name`.
    """
    for feature, pattern in FEATURES.items():
        if any(re.search(pattern, weight) for weight in weights):
            raise CheckpointMismatchError(f"{path}: has {feature}, which SuperViT does not support")
    weights = _as_timm_names(path, weights)
    if name is None:
        module = _module_by_shapes(path, weights, num_heads)
    else:
        module = create_timm(name, num_classes=_num_classes(weights), img_size=_image_side(weights))
    filtered: dict[str, Tensor] = {}
    try:
        filtered = checkpoint_filter_fn(dict(weights), module, adapt_layer_scale=True)
        if not (has_head := "head.weight" in filtered):
            filtered |= {key: tensor for key, tensor in module.state_dict().items() if key.startswith("head")}
        module.load_state_dict(filtered)
        for key in ("patch_embed.proj.weight", "pos_embed"):  # timm would resample these silently
            if key in weights and weights[key].shape[-2:] != module.state_dict()[key].shape[-2:]:
                raise ValueError(f"{key} has a different size")
    except (AssertionError, LookupError, RuntimeError, ValueError) as error:
        what = name or "a plain ViT"
        problem = _misfit(filtered or weights, module)
        raise CheckpointMismatchError(f"{path}: its weights do not match {what}: {problem}") from error
    return PlainViT(module.eval(), preprocessing_of(name) if name else {}, has_head)


def create_timm(name: str, *, pretrained: bool = False, **options: Any) -> VisionTransformer:  # noqa: ANN401 - timm's own
    """Build timm's model of a name, with timm's weights if `pretrained` is set.

    Raises:
        CheckpointMismatchError: timm knows no such model, or the model is not a plain ViT.
        UnreadableCheckpointError: the weights cannot be downloaded, or timm cannot build the model with these options.
    """
    if not timm.is_model(name):
        raise CheckpointMismatchError(f"{name}: unknown timm model")
    options = {key: value for key, value in options.items() if value is not None}
    try:
        module = timm.create_model(name, pretrained=pretrained, **options)
    except (TypeError, AssertionError) as error:  # a convolutional network takes no img_size
        raise CheckpointMismatchError(f"{name}: not a plain ViT") from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = (
            "timm's weights are not available; give a file" if pretrained else "timm cannot build it with these options"
        )
        raise UnreadableCheckpointError(f"{name}: {reason}") from error
    if not isinstance(module, VisionTransformer):
        kinds = {"Eva": "rotary position embedding (RoPE)", "Beit": "relative position bias"}
        kinds |= {"SwinTransformer": "attention within windows", "VisionTransformerRelPos": "relative position bias"}
        found = next((feature for kind, feature in kinds.items() if type(module).__name__.startswith(kind)), None)
        raise CheckpointMismatchError(
            f"{name}: " + (f"has {found}, which SuperViT does not support" if found else "not a plain ViT")
        )
    return module


def preprocessing_of(name: str) -> dict[str, Any]:
    """Return the preprocessing with which timm's weights of a name were trained, as fields of SuperViTConfig."""
    data = timm.data.resolve_data_config(timm.get_pretrained_cfg(name).to_dict())
    return {
        "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
        "interpolation": data["interpolation"],
        "crop_fraction": data["crop_pct"],
    }


def _as_timm_names(path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' weights and DINOv2's registers to timm's names; weights of other layouts keep theirs."""
    class_token = next((name for name in weights if name.endswith("embeddings.cls_token")), None)
    if class_token is None:
        return _with_registers({name: tensor for name, tensor in weights.items() if name != "mask_token"})
    prefix = class_token.removesuffix("embeddings.cls_token")
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    own |= {name: tensor for name, tensor in weights.items() if re.match(r"(\w+_)?classifier\.", name)}
    joined: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if QUERY_KEY_VALUE[0] in name:
            names = [name.replace(QUERY_KEY_VALUE[0], part) for part in QUERY_KEY_VALUE]
            if not own.keys() >= set(names):
                raise CheckpointMismatchError(
                    f"{path}: not the weights of a plain ViT: queries, keys or values are missing"
                )
            parts = [own[part] for part in names]
            name, tensor = name.replace(QUERY_KEY_VALUE[0], "attn.qkv."), torch.cat(parts)
        if not any(part in name for part in (*QUERY_KEY_VALUE, "mask_token", "pooler.")):
            joined[name] = tensor
    renamed = {}
    for name, tensor in joined.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return _with_registers(renamed)


def _with_registers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert DINOv2's registers to timm's layout, in which only patches have a position embedding."""
    if "register_tokens" not in weights or "pos_embed" not in weights:
        return weights
    weights = {("reg_token" if name == "register_tokens" else name): tensor for name, tensor in weights.items()}
    position = weights["pos_embed"]
    return weights | {"cls_token": weights["cls_token"] + position[:, :1], "pos_embed": position[:, 1:]}


def _module_by_shapes(path: Path, weights: dict[str, Tensor], num_heads: int | None) -> VisionTransformer:
    try:
        blocks = {int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
        out, channels, patch_size, patch_width = weights["patch_embed.proj.weight"].shape
        if channels != 3 or patch_size != patch_width:
            raise CheckpointMismatchError(f"{path}: its patches are not squares of RGB pixels")
        hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
        patches, no_embed_class = _num_patches(weights)
    except (LookupError, ValueError) as error:
        parts = {"cls_token": "no class token", "pos_embed": "no position embedding, as with RoPE"}
        lacking = [part for name, part in parts.items() if name not in weights]
        is_vit = "patch_embed.proj.weight" in weights and len(lacking) < len(parts)
        reason = (
            f"has {lacking[0]}"
            if is_vit and lacking
            else "not the weights of a plain ViT; try `supervit convert` with --name"
        )
        raise CheckpointMismatchError(f"{path}: {reason}") from error
    if num_heads is None and out not in COMMON_WIDTHS:
        raise CheckpointMismatchError(
            f"{path}: cannot infer the number of heads for width {out}; give --num-heads, or {NAME_IT}"
        )
    pooled = "fc_norm.weight" in weights
    layer_scale = any(re.search(r"\.ls1\.gamma|\.gamma_1$", name) for name in weights)
    options = {
        "img_size": math.isqrt(patches) * patch_size,
        "patch_size": patch_size,
        "num_classes": _num_classes(weights) or 0,
        "global_pool": "avg" if pooled else "token",
        "embed_dim": out,
        "depth": len(blocks),
        "num_heads": num_heads or out // HEAD_DIM,
        "mlp_ratio": hidden / out,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "init_values": 1.0 if layer_scale else None,
        "no_embed_class": no_embed_class,
        "reg_tokens": weights["reg_token"].shape[1] if "reg_token" in weights else 0,
        "pre_norm": "norm_pre.weight" in weights,
        "norm_layer": partial(torch.nn.LayerNorm, eps=CLIP_EPS) if "norm_pre.weight" in weights else None,
        "weight_init": "skip",
    }
    kind = VisionTransformerDistilled if "dist_token" in weights else VisionTransformer
    try:
        return kind(**options)
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointMismatchError(f"{path}: its weights do not match a plain ViT; give --name") from error


def _num_patches(weights: dict[str, Tensor]) -> tuple[int, bool]:
    """Count the patches of the position embedding, and return whether it leaves out the prefix tokens."""
    rows = weights["pos_embed"].shape[1]
    prefix = weights["cls_token"].shape[1]
    prefix += sum(weights[name].shape[1] for name in ("dist_token", "reg_token") if name in weights)
    for patches, no_embed_class in ((rows - prefix, False), (rows, True)):
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            return patches, no_embed_class
    raise ValueError("the patches do not form a square")


def _num_classes(weights: dict[str, Tensor]) -> int | None:
    head = weights.get("head.weight")
    return head.shape[0] if head is not None and head.ndim == 2 else None


def _image_side(weights: dict[str, Tensor]) -> int | None:
    """Return the image side of the position embedding, for which it needs no resampling; None if unknown."""
    try:
        return math.isqrt(_num_patches(weights)[0]) * weights["patch_embed.proj.weight"].shape[-1]
    except (LookupError, ValueError):  # a layout that timm will rename
        return None


def _misfit(weights: dict[str, Tensor], module: VisionTransformer) -> str:
    expected = module.state_dict()
    wrong = [name for name in expected if name not in weights or weights[name].shape != expected[name].shape]
    strange = [name for name in weights if name not in expected]
    return f"{len(wrong)} missing or of the wrong shape, {len(strange)} unexpected, such as {(wrong or strange)[0]!r}"
