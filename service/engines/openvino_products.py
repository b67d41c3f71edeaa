"""Products of tokens and weights as OpenVINO nodes: in floating point, or in 8 bits in this CPU's fastest form.

For a product in 8 bits, activations are quantised per tensor, between two values that calibration found, and weights
per output, symmetrically around zero (FakeQuantize, which OpenVINO turns into integers).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import openvino as ov  # type: ignore[import-untyped] # it publishes no types
from openvino import opset15 as op

from models.quantization import QUANTIZATION_STEPS, SMOOTHING_STEPS, BlockRanges, ProductInput, Range

Floats = npt.NDArray[np.float32]

VNNI_CAPABILITIES = ("avx512_vnni", "avx_vnni")
INT8_MAX = 127
# The integer that the largest weight of an output becomes. Two products of 255 and this are the most that 16 bits hold:
# AVX2 sums two of them in 16 bits and loses any excess. The bound holds on all CPUs, so that a checkpoint is equally
# accurate on each.
WEIGHT_MAX = 63


class Products:
    """Products in floating point.

    `enter` or `stay` prepares the input of each product, and `leave` turns the output of the last one into tokens.
    """

    @property
    def notes(self) -> list[ov.Node]:
        """Further outputs of the graph, after the logits."""
        return []

    def enter(self, tokens: ov.Node, place: ProductInput) -> ov.Node:  # noqa: ARG002 - subclasses tell places apart
        """Turn (B, N, D) tokens into the input of products."""
        return tokens

    def stay(self, hidden: ov.Node, place: ProductInput) -> ov.Node:
        """Turn the output of a product, after an elementwise function, into the input of the next product."""
        return self.enter(hidden, place)

    def linear(self, entered: ov.Node, weight: Floats, bias: Floats) -> ov.Node:
        """Multiply by a (outputs, inputs) weight and add a bias."""
        return linear(entered, weight, bias)

    def leave(self, given: ov.Node) -> ov.Node:
        """Turn the output of a product into (B, N, D) tokens."""
        return given


class ObservedProducts(Products):
    """Products in floating point that also record the range of their inputs, and their weights.

    Attributes:
        places: the recorded places, in the order of `notes`, which has two nodes for each: the lowest and the highest
            value of each channel of each image's tokens, both (B, D).
        largest_weights: by place, the largest absolute weight of each channel, (D,).
    """

    def __init__(self) -> None:
        self.places: list[ProductInput] = []
        self.largest_weights: dict[ProductInput, Floats] = {}
        self._notes: list[ov.Node] = []
        self._entered = ProductInput(0, "qkv")

    @property
    def notes(self) -> list[ov.Node]:
        """Two nodes for each place."""
        return self._notes

    def enter(self, tokens: ov.Node, place: ProductInput) -> ov.Node:
        """Record the range of the tokens, unless it is recorded for their place, and return the tokens."""
        self._entered = place
        if place not in self.places:
            self.places.append(place)
            self._notes += [op.reduce_min(tokens, integers(1)), op.reduce_max(tokens, integers(1))]
        return tokens

    def linear(self, entered: ov.Node, weight: Floats, bias: Floats) -> ov.Node:
        """Record the weight for the place that was entered last, and multiply by it."""
        largest = np.abs(weight).max(axis=0)
        self.largest_weights[self._entered] = np.maximum(largest, self.largest_weights.get(self._entered, largest))
        return super().linear(entered, weight, bias)


class IntegerProducts(Products):
    """Products in 8 bits, as matrix products: for CPUs with instructions that sum four such products (VNNI)."""

    def __init__(self, ranges: Sequence[BlockRanges]) -> None:
        self._ranges = ranges
        self._smoothing: Floats = np.ones(1, np.float32)

    def enter(self, tokens: ov.Node, place: ProductInput) -> ov.Node:
        """Smooth and quantise (B, N, D) tokens."""
        return self._quantise(tokens, place, (1, 1, -1))

    def linear(self, entered: ov.Node, weight: Floats, bias: Floats) -> ov.Node:
        """Multiply the input that was entered last by a weight, smoothed to match and quantised."""
        smoothed = quantised(weight * self._smoothing)
        return op.add(op.matmul(entered, smoothed, False, True), op.constant(bias))

    def _quantise(self, values: ov.Node, place: ProductInput, shape: tuple[int, ...]) -> ov.Node:
        """Smooth and quantise values whose channels lie along the axis where `shape` is -1."""
        found: Range = getattr(self._ranges[place.block], place.layer)
        self._smoothing = np.exp2(np.array(found.smoothing or (0,), np.float32) / SMOOTHING_STEPS)
        if found.smoothing:
            values = op.multiply(values, op.constant((1 / self._smoothing).reshape(shape)))
        low, high = (op.constant(np.float32(value)) for value in (found.low, found.high))
        return op.fake_quantize(values, low, high, low, high, QUANTIZATION_STEPS + 1)


class ConvolvedProducts(IntegerProducts):
    """Products in 8 bits, as convolutions of (B, D, N, 1) tokens: for CPUs without VNNI.

    On those CPUs, OpenVINO's integer matrix products take as long as its float ones, and its 1x1 convolutions half as
    long (an MLP of DeiT-S, AVX2).
    """

    def enter(self, tokens: ov.Node, place: ProductInput) -> ov.Node:
        """Smooth and quantise (B, N, D) tokens, then move their channels to the second axis."""
        rows = op.reshape(super().enter(tokens, place), integers(0, 0, 1, -1), True)
        return op.transpose(rows, integers(0, 3, 1, 2))

    def stay(self, hidden: ov.Node, place: ProductInput) -> ov.Node:
        """Smooth and quantise values whose channels are on the second axis."""
        return self._quantise(hidden, place, (1, -1, 1, 1))

    def linear(self, entered: ov.Node, weight: Floats, bias: Floats) -> ov.Node:
        """Convolve with a quantised 1x1 kernel."""
        kernel = quantised((weight * self._smoothing)[:, :, None, None])
        moved = op.convolution(entered, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
        return op.add(moved, op.constant(bias[None, :, None, None]))

    def leave(self, given: ov.Node) -> ov.Node:
        """Move the channels to the last axis again."""
        return op.reshape(op.transpose(given, integers(0, 2, 3, 1)), integers(0, 0, -1), True)


def integer_products(ranges: Sequence[BlockRanges], capabilities: Mapping[str, object]) -> IntegerProducts | None:
    """Choose how a CPU computes products in 8 bits; return None for a CPU that would gain nothing.

    Args:
        ranges: ranges of the activations.
        capabilities: capabilities of the CPU, under torch's names.
    """
    if any(capabilities.get(name) for name in VNNI_CAPABILITIES):
        return IntegerProducts(ranges)
    return ConvolvedProducts(ranges) if capabilities.get("avx2") else None


def linear(tokens: ov.Node, weight: Floats, bias: Floats) -> ov.Node:
    """Multiply (..., inputs) by a (outputs, inputs) weight and add a bias, in floating point."""
    return op.add(op.matmul(tokens, op.constant(weight), False, True), op.constant(bias))


def quantised(weight: Floats) -> ov.Node:
    """Quantise (outputs, ...) weights symmetrically around zero, each output's largest to WEIGHT_MAX."""
    largest = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True)
    end = np.maximum(largest, np.finfo(np.float32).tiny) * np.float32(INT8_MAX / WEIGHT_MAX)
    low, high = op.constant(-end), op.constant(end)
    return op.fake_quantize(op.constant(weight), low, high, low, high, 2 * INT8_MAX + 1)


def integers(*values: int) -> ov.Node:
    """Return a constant of 32-bit integers."""
    return op.constant(np.array(values, np.int32))
