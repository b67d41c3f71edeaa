"""Converts tensors to and from Triton's binary layout; every size is checked before anything is made of the bytes."""

import math
import struct
from collections.abc import Iterable

from service.errors import InvalidTensorError
from service.inference_protocol.messages import InputTensor, OutputTensor

LENGTH = struct.Struct("<I")  # before each element of BYTES
MAX_DIMENSIONS = 4


def num_elements(tensor: InputTensor) -> int:
    """Return the number of elements in a tensor's shape.

    Raises:
        InvalidTensorError: the shape has no or too many dimensions, or one below 1.
    """
    shape = tensor.shape
    if not 1 <= len(shape) <= MAX_DIMENSIONS:
        raise InvalidTensorError(f"{tensor.name}: the shape must have 1 to {MAX_DIMENSIONS} dimensions")
    if min(shape) < 1:
        raise InvalidTensorError(f"{tensor.name}: every dimension of the shape must be at least 1, not {shape}")
    return math.prod(shape)


def split_elements(name: str, raw: bytes | memoryview, number: int) -> list[bytes]:
    """Split the binary layout of BYTES into its elements.

    Args:
        name: name of the tensor.
        raw: the elements, each after its length.
        number: number of elements in the shape.

    Raises:
        InvalidTensorError: there are more or fewer elements, or one is longer than the bytes that are left.
    """
    elements, start = [], 0
    for index in range(number):
        end = start + LENGTH.size
        if end > len(raw):
            raise InvalidTensorError(f"{name}: the shape has {number} elements, but the data has {index}")
        (length,) = LENGTH.unpack_from(raw, start)
        if length > len(raw) - end:
            raise InvalidTensorError(
                f"{name}: element {index} must have {length} bytes, but only {len(raw) - end} are left"
            )
        elements.append(bytes(raw[end : end + length]))
        start = end + length
    if start < len(raw):
        raise InvalidTensorError(f"{name}: {len(raw) - start} bytes follow the {number} elements of the shape")
    return elements


def join_elements(elements: Iterable[bytes]) -> bytes:
    """Join elements of BYTES into the binary layout."""
    return b"".join(part for element in elements for part in (LENGTH.pack(len(element)), element))


def to_raw(tensor: OutputTensor) -> bytes:
    """Convert a tensor of a reply to the binary layout."""
    if tensor.datatype == "BYTES":
        return join_elements(str(value).encode() for value in tensor.values)
    return tensor.contents.astype("<f4", copy=False).tobytes()
