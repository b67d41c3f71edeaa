"""Builds a SuperViT as OpenVINO graphs: the preparation of images, and one classifier for all sub-networks and batches.

Building them node by node takes hundredths of a second; nothing is compiled or run here. Nothing in the classifier
depends on the sub-network: the side of the images, the position embedding and the number of tokens that each prune
block keeps are inputs.
"""

from typing import cast

import numpy as np
import numpy.typing as npt
import openvino as ov  # type: ignore[import-untyped] # it publishes no types
from openvino import opset15 as op
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.layers import Attention, Block, ConvStem
from models.quantization import ProductInput
from models.subnetwork import Activation, Pooling, SubNetwork, SuperViTConfig
from models.supervit import SuperViT
from service.engines.openvino_products import Floats, Products, integers, linear

Array = npt.NDArray[np.generic]

# Added to a prefix token's score, it ranks that token above every patch token: averaged softmax weights never exceed 1.
PREFIX_BONUS = 2.0
QUICK_GELU = 1.702
# The prefix tokens that a head reads; None for a head that reads the patch tokens.
HEAD_TOKENS: dict[Pooling, list[int] | None] = {"class": [0], "distilled": [0, 1], "mean": None}


def build_scaling(config: SuperViTConfig) -> ov.Model:
    """Build the preparation for the largest grid: (B, 3, S, S) uint8 images to normalised float32 ones."""
    images = _full_size_images(config)
    return ov.Model([_normalised(op.convert(images, np.float32), config)], [images], "scaling")


def build_resizing(config: SuperViTConfig) -> ov.Model:
    """Build the preparation for the other grids: (B, 3, S, S) uint8 images to normalised float32 ones of another side.

    Its inputs are the images and `resize_inputs`. It interpolates between the nearest rows, then between the nearest
    columns: OpenVINO's own Interpolate, bilinear, gives the same and takes twice as long.
    """
    images = _full_size_images(config)
    lower, upper = (op.parameter([-1], np.int32) for _ in range(2))
    share = op.parameter([-1], np.float32)
    rows = _between(images, lower, upper, op.unsqueeze(share, integers(1)), axis=2)
    return ov.Model([_normalised(_between(rows, lower, upper, share, axis=3), config)], [images, lower, upper, share])


def resize_inputs(from_side: int, to_side: int) -> list[Array]:
    """Return between which pixels each pixel of the smaller image lies, corners aligned, in torch's own arithmetic.

    Returns:
        The index of the pixel below, that of the pixel above, and the share of the one above; each (to_side,).
    """
    place = np.arange(to_side, dtype=np.float32) * np.float32((from_side - 1) / (to_side - 1))
    lower = place.astype(np.int32)
    return [lower, np.minimum(lower + 1, from_side - 1, dtype=np.int32), place - lower.astype(np.float32)]


def build_classifier(model: SuperViT, products: Products | None = None) -> ov.Model:
    """Build the model itself, with the products of its blocks in floating point or as `products` computes them.

    Its inputs are (B, 3, side, side) normalised float32 images at the grid's own side, and `subnetwork_inputs`; its
    outputs are (B, classes) float32 logits, and the notes of the products.
    """
    config, products = model.config, products or Products()
    images = op.parameter([-1, 3, -1, -1], np.float32)
    positions = op.parameter([1, -1, config.width], np.float32)
    kept = {block: op.parameter([], np.int32) for block in sorted(set(config.prune_blocks))}
    bonus = {block: op.parameter([1, -1], np.float32) for block in kept}
    # Rows of zeros for the prefix tokens, which come with the position embedding.
    prefix = config.num_prefix_tokens
    room = op.pad(_embed(model, images), integers(0, prefix, 0), integers(0, 0, 0), "constant", _floats(0.0))
    tokens = op.add(room, positions)
    if model.norm_pre is not None:
        scale, shift = (op.constant(_numpy(tensor)) for tensor in (model.norm_pre.weight, model.norm_pre.bias))
        tokens = op.add(op.multiply(_norm(tokens, model.norm_pre), scale), shift)
    read = HEAD_TOKENS[config.pooling] if model.aux_head is None else None
    for index, block in enumerate(cast("list[Block]", model.blocks)):
        only = read if index == config.depth - 1 else None  # nothing reads the other tokens
        tokens, query, key = _attend(block, tokens, only, products, index)
        if index in kept and only is None:
            tokens = _prune(tokens, _scores(block.attn, query, key), kept[index], bonus[index])
        tokens = _transform(block, tokens, config.activation, products, index)
    outputs = [_classify(model, tokens), *products.notes]
    return ov.Model(outputs, [images, positions, *kept.values(), *bonus.values()], "supervit")


def subnetwork_inputs(model: SuperViT, subnetwork: SubNetwork) -> list[Array]:
    """Return the inputs after the images, with which the classifier runs one sub-network.

    Returns:
        The grid's position embedding (1, N, D) with the P prefix tokens added to its first rows; for each prune block,
        the number of tokens that it keeps, prefix tokens included; for each prune block, (1, N) with PREFIX_BONUS for
        the prefix tokens and 0 elsewhere.

    Raises:
        ValueError: the patch grid was not trained.
    """
    config = model.config
    if subnetwork.patch_grid not in config.patch_grids:
        raise ValueError(f"patch grid {subnetwork.patch_grid} was not trained; it must be one of {config.patch_grids}")
    positions = _numpy(model.pos_embed_list[config.patch_grids.index(subnetwork.patch_grid)]).copy()
    prefix = config.num_prefix_tokens
    positions[:, :prefix] += _numpy(model.cls_token)
    tokens = config.tokens_per_block(subnetwork)
    counts = [tokens[block] for block in sorted(set(config.prune_blocks))]
    bonus = [np.where(np.arange(before) < prefix, PREFIX_BONUS, 0.0).astype(np.float32)[None] for before, _ in counts]
    return [positions, *(np.array(after, np.int32) for _, after in counts), *bonus]


def _full_size_images(config: SuperViTConfig) -> ov.Node:
    return op.parameter([-1, 3, config.image_side, config.image_side], np.uint8)


def _normalised(images: ov.Node, config: SuperViTConfig) -> ov.Node:
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (config.mean, config.std))
    return op.add(op.multiply(images, op.constant(1 / (255 * std))), op.constant(-mean / std))


def _between(images: ov.Node, lower: ov.Node, upper: ov.Node, share: ov.Node, axis: int) -> ov.Node:
    below, above = (op.convert(op.gather(images, index, _int(axis)), np.float32) for index in (lower, upper))
    return op.add(below, op.multiply(op.subtract(above, below), share))


def _embed(model: SuperViT, images: ov.Node) -> ov.Node:
    """Embed the images as (B, N - P, D) patch tokens."""
    stem = model.patch_embed
    if isinstance(stem, ConvStem):
        for convolution, norm in ((stem.conv1, stem.bn1), (stem.conv2, stem.bn2), (stem.conv3, stem.bn3)):
            images = op.relu(_convolve(images, fuse_conv_bn_eval(convolution, norm)))
    patches = _convolve(images, cast("nn.Conv2d", stem.proj))
    return op.transpose(op.reshape(patches, integers(0, model.config.width, -1), True), integers(0, 2, 1))


def _convolve(images: ov.Node, convolution: nn.Conv2d) -> ov.Node:
    padding = cast("tuple[int, int]", convolution.padding)
    weight = op.constant(_numpy(convolution.weight))
    moved = op.convolution(images, weight, convolution.stride, padding, padding, convolution.dilation)
    return moved if convolution.bias is None else op.add(moved, op.constant(_numpy(convolution.bias[:, None, None])))


def _attend(
    block: Block, tokens: ov.Node, only: list[int] | None, products: Products, index: int
) -> tuple[ov.Node, ov.Node, ov.Node]:
    """Return the (B, N, D) tokens after attention, or only some, and the queries and keys before the split into heads.

    Query, key and value are three products, not one: only then do their transposes become part of the attention kernel.
    """
    attention = block.attn
    width = attention.proj.in_features
    weight, bias = _after_norm(attention.qkv, block.norm1)
    normed = _norm(tokens, block.norm1)
    entered = asking = products.enter(normed, ProductInput(index, "qkv"))
    if only is not None:
        tokens, asked = (op.gather(rows, integers(*only), _int(1)) for rows in (tokens, normed))
        asking = products.enter(asked, ProductInput(index, "qkv"))
    parts = [
        products.leave(products.linear(source, weight[part * width :][:width], bias[part * width :][:width]))
        for part, source in enumerate((asking, entered, entered))
    ]
    split = integers(0, 0, attention.num_heads, width // attention.num_heads)
    heads = [op.transpose(op.reshape(part, split, True), integers(0, 2, 1, 3)) for part in parts]
    mixed = op.scaled_dot_product_attention(*heads, scale=_floats(attention.scale))
    joined = op.reshape(op.transpose(mixed, integers(0, 2, 1, 3)), integers(0, 0, width), True)
    projected = products.linear(
        products.enter(joined, ProductInput(index, "proj")), *_branch_end(attention.proj, block.skip_divisor)
    )
    return op.add(tokens, products.leave(projected)), parts[0], parts[1]


def _scores(attention: Attention, query: ov.Node, key: ov.Node) -> ov.Node:
    """Return the (B, N) attention that the class token pays to each token, averaged over heads (paper, section 3.2).

    The dot products within the heads are computed as a product with a constant, the indicator of the heads: for a
    product of two inputs, OpenVINO keeps half a megabyte of code per shape and takes milliseconds to generate it.
    """
    head_width = attention.proj.in_features // attention.num_heads
    indicator = np.kron(np.eye(attention.num_heads), np.full((1, head_width), attention.scale)).astype(np.float32)
    class_query = op.gather(query, integers(0), _int(1))  # (B, 1, D)
    row = op.matmul(op.multiply(key, class_query), op.constant(indicator), False, True)  # (B, N, H)
    return op.reduce_mean(op.softmax(row, 1), integers(2), False)


def _prune(tokens: ov.Node, scores: ov.Node, kept: ov.Node, bonus: ov.Node) -> ov.Node:
    """Keep the prefix tokens and the best-scored others, in their order.

    The bonus must not become a constant: OpenVINO 2026.4 then adds it wrongly to a batch of fixed size.
    """
    best = op.topk(op.add(scores, bonus), kept, 1, "max", "index", index_element_type="i32")
    return op.gather(tokens, best.output(1), _int(1), batch_dims=1)


def _transform(block: Block, tokens: ov.Node, activation: Activation, products: Products, index: int) -> ov.Node:
    entered = products.enter(_norm(tokens, block.norm2), ProductInput(index, "fc1"))
    hidden = products.linear(entered, *_after_norm(block.mlp.fc1, block.norm2))
    if activation == "gelu":
        hidden = op.gelu(hidden, "erf")
    else:
        hidden = op.multiply(hidden, op.sigmoid(op.multiply(hidden, _floats(QUICK_GELU))))
    hidden = products.stay(hidden, ProductInput(index, "fc2"))
    return op.add(tokens, products.leave(products.linear(hidden, *_branch_end(block.mlp.fc2, block.skip_divisor))))


def _classify(model: SuperViT, tokens: ov.Node) -> ov.Node:
    weight, bias = _after_norm(model.head, model.norm)
    if model.config.pooling == "mean":
        averaged = op.reduce_mean(_patches(model, tokens), integers(1), False)
        return linear(_norm(averaged, model.norm), weight, bias)
    read = HEAD_TOKENS[model.config.pooling] or []
    features = op.reshape(
        op.gather(_norm(tokens, model.norm), integers(*read), _int(1)), integers(0, len(weight.T)), True
    )
    logits = linear(features, weight, bias)
    if model.aux_head is None:
        return logits
    patches = _norm(_patches(model, tokens), model.norm)
    auxiliary = op.reduce_max(linear(patches, *_after_norm(model.aux_head, model.norm)), integers(1), False)
    return op.add(logits, op.multiply(auxiliary, _floats(model.config.aux_head_weight)))


def _patches(model: SuperViT, tokens: ov.Node) -> ov.Node:
    prefix, end = model.config.num_prefix_tokens, np.iinfo(np.int32).max
    return op.slice(tokens, integers(prefix), integers(end), integers(1), integers(1))


def _norm(tokens: ov.Node, norm: nn.LayerNorm) -> ov.Node:
    """Normalise without weight and bias, which `_after_norm` folds into the next linear layer."""
    return op.mvn(tokens, integers(-1), True, norm.eps, "inside_sqrt")


def _after_norm(linear: nn.Linear, norm: nn.LayerNorm) -> tuple[Floats, Floats]:
    weight = _numpy(linear.weight)
    scale, shift = (
        np.tile(_numpy(part), weight.shape[1] // norm.normalized_shape[0]) for part in (norm.weight, norm.bias)
    )
    bias = weight @ shift
    return weight * scale, bias if linear.bias is None else bias + _numpy(linear.bias)


def _branch_end(linear: nn.Linear, skip_divisor: float) -> tuple[Floats, Floats]:
    divisor = np.float32(skip_divisor)
    return _numpy(linear.weight) / divisor, _numpy(linear.bias) / divisor


def _numpy(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().float().numpy()
    return array


def _floats(value: float) -> ov.Node:
    return op.constant(np.float32(value))


def _int(value: int) -> ov.Node:
    return op.constant(np.int32(value))
