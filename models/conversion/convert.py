"""Convert plain ViTs to SuperViTs without training: `supervit convert`.

The position embedding is resampled to every patch grid, and the class token's attention decides which tokens are kept.
At the ViT's own grid and keep rate 1, the SuperViT therefore gives the ViT's own answers.
"""

from dataclasses import replace
from pathlib import Path

import timm
import torch
from timm.data import ImageNetInfo
from timm.layers import PatchEmbed, QuickGELU
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer
from torch import Tensor, nn

from models.checkpoint import read_described_weights, save_checkpoint
from models.conversion.initial import InitialWeights, split_positions
from models.conversion.onnx_weights import read_onnx_weights
from models.conversion.options import Convert
from models.conversion.plain_vit import HEAD_DIM, PlainViT, build_plain_vit, create_timm, is_lvvit, preprocessing_of
from models.files.checkpoint_errors import CheckpointMismatchError
from models.header import Header
from models.profiles import ProfileTable
from models.published import published_config
from models.subnetwork import SuperViTConfig
from models.supervit import LVVIT_SMALL, SuperViT

# The published patch grids, as shares of the largest.
GRID_SHARES = (8 / 14, 10 / 14, 12 / 14, 1.0)
# TokenLabeling's LV-ViTs add half of the auxiliary head's logits. Only S and M, of these depths, halve residual
# branches.
LVVIT_AUX_WEIGHT = 0.5
LVVIT_DEPTHS = (16, 20)
# The weights whose shapes tell its architecture, besides its head's, which it may lack.
LVVIT_SHAPES = ("cls_token", "blocks.0.mlp.fc1.weight", "patch_embed.proj.weight", "patch_embed.conv1.weight")
IMAGENET_CLASSES = 1000
UNTRAINED = "untrained"  # the only class of a ViT without a head


def convert(options: Convert) -> SuperViTConfig:
    """Convert a plain ViT, write the SuperViT and return its architecture.

    Raises:
        CheckpointError: the weights cannot be read or have a feature that a SuperViT lacks, or the options contradict
            them.
        OSError: `output` cannot be written.
    """
    if options.name is not None and not timm.is_model(options.name):
        raise CheckpointMismatchError(f"{options.name}: unknown timm model")
    initial = open_initial(options.vit, options.name, options.num_heads)
    if initial.config is None:
        raise CheckpointMismatchError(
            f"{options.vit}: the weights of a SuperViT, whose architecture cannot be inferred from them"
        )
    fields = options.model_dump(include=set(SuperViTConfig.__dataclass_fields__), exclude_none=True)
    try:
        config = replace(initial.config, **fields)
    except ValueError as error:
        raise CheckpointMismatchError(f"{options.vit}: {error}") from error
    model = SuperViT(config)
    with torch.no_grad():  # the heads, where the file has none
        for head in filter(None, (model.head, model.aux_head)):
            head.weight.zero_()
    initial.load_into(model, with_head=initial.has_head)
    names = initial.class_names or class_names_for(config.num_classes)
    names = names if initial.has_head else (UNTRAINED,)
    strange = [name for name, weight in model.state_dict().items() if not weight.isfinite().all()]
    if strange:
        raise CheckpointMismatchError(f"{options.vit}: {len(strange)} weights are not finite, such as {strange[0]!r}")
    if options.output.exists() and options.vit.exists() and options.output.samefile(options.vit):
        raise CheckpointMismatchError(f"{options.output}: the output must not overwrite the input")
    save_checkpoint(options.output, model, Header(options.output.stem, config, names, ProfileTable.unmeasured(config)))
    return config


def open_initial(path: Path, name: str | None = None, num_heads: int | None = None) -> InitialWeights:
    """Open initial weights: a SuperViT's or a plain ViT's from a file, or, without such a file, timm's of that name.

    Args:
        path: the file, or timm's name of a plain ViT.
        name: timm's name of the architecture in a file of a plain ViT; None to infer the architecture from the weights.
        num_heads: attention heads of a plain ViT, where neither name nor width determines them.

    Raises:
        CheckpointError: the weights cannot be read, are neither a SuperViT's nor a plain ViT's, or have a feature that
            a SuperViT lacks.
    """
    if not path.exists() and timm.is_model(str(path)):
        vit = PlainViT(create_timm(str(path), pretrained=True).eval(), preprocessing_of(str(path)))
        return from_plain_vit(vit, path)
    if path.suffix == ".onnx":
        return from_plain_vit(build_plain_vit(path, read_onnx_weights(path), name, num_heads), path)
    weights, header = read_described_weights(path)
    if header:
        return InitialWeights(path, *split_positions(path, weights), header.config, header.class_names)
    if "pos_embed_list.0" in weights:
        return InitialWeights(path, *split_positions(path, weights), published_config(weights))
    if is_lvvit(weights):
        return _from_lvvit(weights, path)
    return from_plain_vit(build_plain_vit(path, weights, name, num_heads), path)


def from_plain_vit(vit: PlainViT, source: Path) -> InitialWeights:
    """Convert a timm module to a SuperViT's weights and architecture.

    Raises:
        CheckpointMismatchError: the module has a feature that a SuperViT lacks.
    """
    module = vit.module
    _reject_unsupported_parts(module, source)
    distilled = isinstance(module, VisionTransformerDistilled)
    first: Block = module.blocks[0]
    norm = module.norm if isinstance(module.norm, nn.LayerNorm) else module.fc_norm
    tokens = [module.cls_token, module.dist_token if distilled else None, module.reg_token]
    prefix = torch.cat([token for token in tokens if token is not None], dim=1)
    positions, num_prefix = module.pos_embed, prefix.shape[1]
    if module.no_embed_class:
        positions = torch.cat([torch.zeros_like(prefix), positions], dim=1)
    has_head = vit.has_head and isinstance(module.head, nn.Linear)
    grid = module.patch_embed.grid_size[0]
    depth = len(module.blocks)
    config = SuperViTConfig(
        width=module.embed_dim,
        depth=depth,
        num_heads=first.attn.num_heads,
        mlp_ratio=first.mlp.fc1.out_features / module.embed_dim,
        patch_kernel=module.patch_embed.patch_size[0],
        patch_grids=default_grids(grid),
        prune_blocks=default_prune_blocks(depth),
        num_classes=module.num_classes if has_head else 1,
        num_prefix_tokens=num_prefix,
        pooling="distilled" if distilled else "mean" if module.global_pool == "avg" else "class",
        pre_norm=isinstance(module.norm_pre, nn.LayerNorm),
        activation="quick_gelu" if isinstance(first.mlp.act, QuickGELU) else "gelu",
        norm_eps=norm.eps,
        **vit.preprocessing,
    )
    weights = {"cls_token": prefix, "norm.weight": norm.weight, "norm.bias": norm.bias}
    weights["patch_embed.proj.weight"] = module.patch_embed.proj.weight
    weights["patch_embed.proj.bias"] = _bias(module.patch_embed.proj)
    if config.pre_norm:
        weights |= {"norm_pre.weight": module.norm_pre.weight, "norm_pre.bias": module.norm_pre.bias}
    for index, block in enumerate(module.blocks):
        weights |= {f"blocks.{index}.{name}": tensor for name, tensor in _block_weights(block).items()}
    if has_head:
        heads = [module.head, module.head_dist] if distilled else [module.head]  # their logits are averaged
        weights["head.weight"] = torch.cat([head.weight for head in heads], dim=1) / len(heads)
        weights["head.bias"] = torch.stack([_bias(head) for head in heads]).mean(dim=0)
    weights = {key: tensor.detach().clone() for key, tensor in weights.items()}
    return InitialWeights(source, weights, {grid: positions.detach().clone()}, config)


def default_grids(largest: int) -> tuple[int, ...]:
    """Return the patch grids of a family with the given largest grid, in the published proportions."""
    return tuple(sorted({max(2, round(share * largest)) for share in GRID_SHARES}))


def default_prune_blocks(depth: int) -> tuple[int, ...]:
    """Return the three blocks that prune, a quarter of the depth apart as in the published DeiT-S."""
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))


def _block_weights(block: Block) -> dict[str, Tensor]:
    """Return a block's weights by a SuperViT's names; LayerScale is folded exactly into the projections before it."""
    attn, mlp = block.attn, block.mlp
    weights = {
        "norm1.weight": block.norm1.weight,
        "norm1.bias": block.norm1.bias,
        "attn.qkv.weight": attn.qkv.weight,
        "attn.qkv.bias": _bias(attn.qkv),
        "norm2.weight": block.norm2.weight,
        "norm2.bias": block.norm2.bias,
        "mlp.fc1.weight": mlp.fc1.weight,
        "mlp.fc1.bias": _bias(mlp.fc1),
    }
    for name, linear, scale in (("attn.proj", attn.proj, block.ls1), ("mlp.fc2", mlp.fc2, block.ls2)):
        gamma = scale.gamma if isinstance(scale, LayerScale) else torch.ones(linear.out_features)
        weights |= {f"{name}.weight": gamma[:, None] * linear.weight, f"{name}.bias": gamma * _bias(linear)}
    return weights


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    return torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias


def _reject_unsupported_parts(module: VisionTransformer, source: Path) -> None:
    block = module.blocks[0]
    pooled = module.global_pool == "avg"
    normed = module.fc_norm if pooled else module.norm
    grid = module.patch_embed.grid_size if isinstance(module.patch_embed, PatchEmbed) else (0, 0)
    strange = {
        "a different patch embedding": not isinstance(module.patch_embed, PatchEmbed)
        or not isinstance(module.patch_embed.norm, nn.Identity),
        "patches that do not form a square": grid[0] != grid[1],
        "no class token": module.cls_token is None,
        "no position embedding": module.pos_embed is None,
        "attention pooling": module.attn_pool is not None,
        f"{module.global_pool or 'no'} pooling": module.global_pool not in ("token", "avg"),
        "mean pooling that includes prefix tokens": pooled and module.pool_include_prefix,
        "no norm directly before its head": not isinstance(normed, nn.LayerNorm)
        or not isinstance(module.norm if pooled else module.fc_norm, nn.Identity),
        "parallel or post-norm blocks": type(block) is not Block,
    }
    if not strange["parallel or post-norm blocks"]:
        attn, mlp = block.attn, block.mlp
        strange |= {
            "a different attention module": type(attn) is not Attention or attn.attn_dim != module.embed_dim,
            "normalised queries and keys": not isinstance(getattr(attn, "q_norm", None), nn.Identity),
            "normalised attention": not isinstance(getattr(attn, "norm", None), nn.Identity),
            "gated attention": getattr(attn, "gate", None) is not None,
            "SwiGLU": type(mlp) is not Mlp,
            "a norm inside its MLP": not isinstance(getattr(mlp, "norm", None), nn.Identity),
            "a different activation": type(getattr(mlp, "act", None)) not in (nn.GELU, QuickGELU)
            or getattr(mlp.act, "approximate", "none") != "none",
        }
    found = next((feature for feature, is_there in strange.items() if is_there), None)
    if found:
        raise CheckpointMismatchError(f"{source}: has {found}, which SuperViT does not support")


def _from_lvvit(weights: dict[str, Tensor], path: Path) -> InitialWeights:
    if missing := [name for name in LVVIT_SHAPES if name not in weights]:
        raise CheckpointMismatchError(f"{path}: an LV-ViT without {', '.join(missing)}")
    width = weights["cls_token"].shape[-1]
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if depth not in LVVIT_DEPTHS:
        raise CheckpointMismatchError(f"{path}: an LV-ViT of {depth} blocks is neither LV-ViT-S nor LV-ViT-M")
    rest, positions = split_positions(path, weights)
    config = replace(
        LVVIT_SMALL,
        width=width,
        depth=depth,
        num_heads=width // HEAD_DIM,
        mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        patch_kernel=2 * weights["patch_embed.proj.weight"].shape[-1],
        patch_grids=default_grids(max(positions)),
        stem_width=weights["patch_embed.conv1.weight"].shape[0],
        num_classes=len(weights["head.weight"]) if "head.weight" in weights else 1,
        aux_head_weight=LVVIT_AUX_WEIGHT,
    )
    return InitialWeights(path, rest, positions, config)


def class_names_for(num_classes: int) -> tuple[str, ...]:
    """Return class names for a network without any: a thousand are taken to be ImageNet's, others are numbered."""
    if num_classes == IMAGENET_CLASSES:
        return tuple(ImageNetInfo().label_descriptions())
    return tuple(f"class {index}" for index in range(num_classes))
