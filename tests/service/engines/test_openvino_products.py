from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov  # type: ignore[import-untyped] # it publishes no types
import pytest
import torch
from openvino import opset15 as op

from models.data.images import normalise
from models.quantization import LAYERS, QUANTIZATION_STEPS, SMOOTHING_STEPS, BlockRanges, ProductInput, Range
from models.subnetwork import SubNetwork, SuperViTConfig
from models.supervit import SuperViT
from service.engines.openvino_engine import OpenVINOEngine
from service.engines.openvino_products import (
    WEIGHT_MAX,
    ConvolvedProducts,
    Floats,
    IntegerProducts,
    ObservedProducts,
    Products,
    integer_products,
)

CONFIG = SuperViTConfig(
    width=24, depth=3, num_heads=2, patch_kernel=4, patch_grids=(2, 4), prune_blocks=(1,), num_classes=7
)
WIDE = Range.of(-2.0, 3.0)
RANGES = (BlockRanges(WIDE, WIDE, WIDE, WIDE),)
KINDS: Sequence[Callable[[Sequence[BlockRanges]], IntegerProducts]] = (IntegerProducts, ConvolvedProducts)


def compute(products: Products, tokens: Floats, weight: Floats, bias: Floats) -> Floats:
    """Run tokens through two products with a ReLU between."""
    parameter = op.parameter([-1, -1, tokens.shape[2]], np.float32)
    hidden = op.relu(products.linear(products.enter(parameter, ProductInput(0, "fc1")), weight, bias))
    given = products.leave(products.linear(products.stay(hidden, ProductInput(0, "fc2")), weight, bias))
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = ov.Core().compile_model(ov.Model([given], [parameter], "products"), "CPU", options)
    found: Floats = compiled([tokens])[0]
    return found


def rounded_tokens(tokens: npt.NDArray[np.floating[Any]], within: Range) -> Floats:
    step = (within.high - within.low) / QUANTIZATION_STEPS
    rounded: Floats = (np.round(np.clip(tokens, within.low, within.high) / step) * step).astype(np.float32)
    return rounded


def rounded_weight(weight: Floats) -> Floats:
    step = np.abs(weight).max(axis=1, keepdims=True) / WEIGHT_MAX
    rounded: Floats = (np.round(weight / step) * step).astype(np.float32)
    return rounded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [(), tuple(range(-8, 8))])
def test_products_in_8_bits_equal_products_of_rounded_tokens_and_weights(
    kind: Callable[[Sequence[BlockRanges]], IntegerProducts], smoothing: tuple[int, ...]
) -> None:
    """The weights are so small beside their output's largest that a CPU without VNNI loses no sum of two products."""
    rng = np.random.default_rng(4)
    factors = np.exp2(np.array(smoothing or (0,), np.float32) / SMOOTHING_STEPS)
    tokens = (rng.normal(size=(3, 5, 16)) * factors).astype(np.float32)
    weight = (rng.uniform(-0.05, 0.05, size=(16, 16)) / factors).astype(np.float32)
    weight[:, 0] = 0.3 / factors[0]
    bias = rng.normal(size=16).astype(np.float32)
    range_ = Range.of(-2.0, 3.0, smoothing)
    products = kind((BlockRanges(range_, range_, range_, range_),))
    rounded = rounded_weight(weight * factors)
    hidden = np.maximum(rounded_tokens(tokens / factors, WIDE) @ rounded.T + bias, 0)
    expected = rounded_tokens(hidden / factors, WIDE) @ rounded.T + bias
    exact = np.maximum(tokens @ weight.T + bias, 0) @ weight.T + bias
    off = np.abs(compute(products, tokens, weight, bias) - expected)
    assert np.abs(exact - expected).mean() > 0.001
    # A hidden value half-way between two steps may be rounded either way, depending on the order of a sum.
    assert np.median(off) < 1e-5
    assert off.mean() < 0.1 * np.abs(exact - expected).mean()


def test_convolutions_lose_no_sum_of_products_on_a_cpu_without_vnni() -> None:
    """Tokens and weights are at their maximum: with weights of up to 127, two products would exceed 16 bits."""
    tokens = np.full((1, 2, 16), 3.0, np.float32)
    weight, bias = np.full((16, 16), 0.01, np.float32), np.zeros(16, np.float32)
    ranges = (BlockRanges(*(Range.of(0.0, 3.0),) * 4),)
    np.testing.assert_allclose(compute(ConvolvedProducts(ranges), tokens, weight, bias), 16 * 0.01 * 0.48, rtol=0.01)


def test_products_in_floating_point_are_exact() -> None:
    rng = np.random.default_rng(4)
    tokens, weight, bias = (rng.normal(size=size).astype(np.float32) for size in ((2, 5, 8), (8, 8), (8,)))
    expected = np.maximum(tokens @ weight.T + bias, 0) @ weight.T + bias
    for products in (Products(), ObservedProducts()):
        np.testing.assert_allclose(compute(products, tokens, weight, bias), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("capabilities", "kind"),
    [
        ({"avx2": True, "avx512_vnni": True}, IntegerProducts),
        ({"avx2": True, "avx_vnni": True}, IntegerProducts),
        ({"avx2": True, "avx512_vnni": False, "avx512_f": True}, ConvolvedProducts),
        ({"avx2": False}, type(None)),
        ({}, type(None)),
    ],
)
def test_the_kind_of_integer_products_depends_on_the_cpu(capabilities: dict[str, object], kind: type) -> None:
    assert type(integer_products(RANGES, capabilities)) is kind


@pytest.fixture(scope="module")
def model() -> SuperViT:
    torch.manual_seed(3)
    model = SuperViT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def observed(
    model: SuperViT, images: torch.Tensor, subnetwork: SubNetwork
) -> dict[ProductInput, tuple[Floats, Floats]]:
    products = ObservedProducts()
    notes = OpenVINOEngine(model, 1, "float32", products).observe(images, subnetwork)
    return dict(zip(products.places, zip(notes[::2], notes[1::2], strict=True), strict=True))


def test_the_input_range_of_every_product_is_observed_for_each_image(model: SuperViT, images: torch.Tensor) -> None:
    subnetwork, seen = SubNetwork(4, 0.5), {}
    for index, block in enumerate(model.blocks):
        for layer in ("proj", "fc2"):  # for the other layers, the norm's weights are folded into the product
            module = getattr(block.attn if layer == "proj" else block.mlp, layer)
            module.register_forward_pre_hook(lambda _, given, key=(index, layer): seen.update({key: given[0]}))
    with torch.inference_mode():
        model(normalise(images, CONFIG), subnetwork)
    found = observed(model, images, subnetwork)
    assert len(found) == 4 * CONFIG.depth
    for index in range(CONFIG.depth - 1):  # of the last block only the class token is read
        for layer in ("proj", "fc2"):
            values = seen[index, layer]
            lows, highs = found[ProductInput(index, layer)]  # type: ignore[arg-type] # they are layers
            np.testing.assert_allclose(lows, values.amin(1), atol=1e-4)
            np.testing.assert_allclose(highs, values.amax(1), atol=1e-4)


def test_logits_in_8_bits_are_close_to_those_in_floating_point(model: SuperViT, images: torch.Tensor) -> None:
    """The products are convolutions, which lose no sum on any CPU with AVX2."""
    for subnetwork in (SubNetwork(4, 1.0), SubNetwork(2, 1.0)):
        found = observed(model, images, subnetwork)
        ends = {place: Range.of(float(lows.min()), float(highs.max())) for place, (lows, highs) in found.items()}
        ranges = [BlockRanges(**{layer: ends[ProductInput(block, layer)] for layer in LAYERS}) for block in range(3)]
        engine = OpenVINOEngine(model, 1, "float32", ConvolvedProducts(ranges))
        expected = OpenVINOEngine(model, 1, "float32").run(images, subnetwork)
        answered = engine.run(images, subnetwork)
        assert not torch.allclose(answered, expected, rtol=1e-5, atol=1e-5)
        assert (answered - expected).abs().mean() < 0.06 * expected.std()
        assert ", int8, 1 threads" in engine.describe()
