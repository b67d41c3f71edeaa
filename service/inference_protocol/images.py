"""Turns the input `image` into the images of a request: files, or pixels, which need no codec but queue like files."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service.decoding.images import LEAST_COST_S, OpenedImage
from service.domain import MAX_IMAGES
from service.errors import InvalidTensorError
from service.inference_protocol.messages import InputTensor, Values
from service.inference_protocol.tensors import num_elements, split_elements

INPUT = "image"
CHANNELS = 3
RAW_TYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")}
# Time to convert a value in the binary layout, or in a list from JSON or protobuf; measured on a core of 2.5 GHz.
RAW_NS, VALUES_NS = 3, 75

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
# A `str` is base64.
InputImage = bytes | str | OpenedImage


def images_of(tensor: InputTensor, side: int) -> list[InputImage]:
    """Split a request's input into its images; nothing is decoded or converted yet.

    Args:
        tensor: the input `image`: (N) or (N, 1) files as BYTES, or (N, 3, S, S) pixels, RGB, as UINT8 or as FP32 from 0
            to 1. N is at most MAX_IMAGES.
        side: S in pixels.

    Raises:
        InvalidTensorError: the tensor has another name, form or length, or too many images.
    """
    if tensor.name != INPUT:
        raise InvalidTensorError(f"{tensor.name}: unknown input; the model's input is {INPUT}")
    if unknown := next((name for name in tensor.parameters if name.startswith("shared_memory")), None):
        raise InvalidTensorError(f"{INPUT}: {unknown}: shared memory is not supported")
    number, elements = tensor.shape[0] if tensor.shape else 0, num_elements(tensor)
    if number > MAX_IMAGES:
        raise InvalidTensorError(f"{INPUT}: a request may have at most {MAX_IMAGES} images, not {number}")
    if tensor.datatype == "BYTES":
        if elements != number:
            raise InvalidTensorError(f"{INPUT}: the shape for BYTES must be (N) or (N, 1), not {tensor.shape}")
        return list(_files(tensor, number))
    if tensor.datatype not in RAW_TYPES:
        raise InvalidTensorError(
            f"{INPUT}: the datatype {tensor.datatype} is not supported; choose from BYTES, {', '.join(RAW_TYPES)}"
        )
    if tensor.shape[1:] != (CHANNELS, side, side):
        wanted = f"(N, {CHANNELS}, {side}, {side})"
        raise InvalidTensorError(f"{INPUT}: the shape for {tensor.datatype} must be {wanted}, not {tensor.shape}")
    if isinstance(tensor.contents, bytes | memoryview):
        return _raw_images(tensor.contents, tensor.datatype, number, side)
    return _listed_images(tensor.contents, tensor.datatype, number, side)


def _files(tensor: InputTensor, number: int) -> Sequence[bytes | str]:
    if isinstance(tensor.contents, bytes | memoryview):
        return split_elements(INPUT, tensor.contents, number)
    if (given := len(tensor.contents)) != number:
        raise InvalidTensorError(f"{INPUT}: the shape has {number} elements, but the data has {given}")
    # Nested lists of shape (N, 1) are flattened.
    elements = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in tensor.contents]
    files = [element for element in elements if isinstance(element, bytes | str)]
    if len(files) != number:
        raise InvalidTensorError(f"{INPUT}: elements of BYTES must be base64 strings")
    return files


def _raw_images(raw: bytes | memoryview, datatype: str, number: int, side: int) -> list[InputImage]:
    dtype, values = RAW_TYPES[datatype], CHANNELS * side * side
    wanted = number * values * dtype.itemsize
    if len(raw) != wanted:
        raise InvalidTensorError(f"{INPUT}: the data must have {wanted} bytes of {datatype}, not {len(raw)}")
    pixels = np.frombuffer(raw, dtype).reshape(number, CHANNELS, side, side)
    return [_opened(datatype, RAW_NS * values, partial(to_uint8, image)) for image in pixels]


def _listed_images(values: Values, datatype: str, number: int, side: int) -> list[InputImage]:
    each = CHANNELS * side * side
    if len(values) == number * each:
        images: Values = [values[start : start + each] for start in range(0, number * each, each)]
    elif len(values) == number:
        images = values
    else:
        raise InvalidTensorError(f"{INPUT}: the data must have {number * each} values, not {len(values)}")
    return [_opened(datatype, VALUES_NS * each, partial(_from_list, image, datatype, side)) for image in images]


def _opened(datatype: str, cost_ns: float, decode: "partial[Tensor]") -> OpenedImage:
    return OpenedImage(datatype, LEAST_COST_S + 1e-9 * cost_ns, 0, decode)


def _from_list(values: object, datatype: str, side: int) -> Tensor:
    wanted = CHANNELS * side * side
    if _holds_text(values):  # NumPy would read "0.5" as a number
        raise InvalidTensorError(f"{INPUT}: values of {datatype} must be numbers, not strings")
    try:
        # At once to numbers: from strings, NumPy would make an array whose every element is as long as the longest.
        pixels = np.asarray(values, np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidTensorError(f"{INPUT}: values of {datatype} must be numbers in lists of equal lengths") from error
    if pixels.size != wanted:
        raise InvalidTensorError(f"{INPUT}: an image must have {wanted} values, not {pixels.size}")
    if datatype == "FP32":
        return to_uint8(pixels.astype(np.float32).reshape(CHANNELS, side, side))
    converted = np.clip(np.nan_to_num(pixels), 0, 255).astype(np.uint8)
    if (converted != pixels).any():
        raise InvalidTensorError(f"{INPUT}: values of UINT8 must be integers from 0 to 255")
    return to_uint8(converted.reshape(CHANNELS, side, side))


def _holds_text(values: object) -> bool:
    if not isinstance(values, list):
        return isinstance(values, str)
    types = set(map(type, values))
    return str in types or (list in types and any(map(_holds_text, values)))


def to_uint8(pixels: Pixels) -> Tensor:
    """Convert the pixels of an image to the uint8 that the engine takes.

    Args:
        pixels: (3, S, S), RGB, uint8, or float32 from 0 to 1, which is rounded to the nearest of 256 levels.

    Raises:
        InvalidTensorError: a value is NaN or outside 0..1.
    """
    if pixels.dtype == np.uint8:
        return torch.from_numpy(np.array(pixels))
    lowest, highest = float(pixels.min()), float(pixels.max())
    if not (lowest >= 0 and highest <= 1):  # in this form, NaN fails as well
        raise InvalidTensorError(
            f"{INPUT}: values of FP32 must be pixels scaled to 0..1 (normalised by the server), not "
            f"{lowest:.4g} to {highest:.4g}"
        )
    return torch.from_numpy(np.rint(pixels * np.float32(255)).astype(np.uint8))
