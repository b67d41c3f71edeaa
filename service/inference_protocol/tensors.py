"""Tensors to and from the bytes of Triton's binary layout; every size is checked before anything is made of it."""

import math
import struct
from collections.abc import Iterable

from service.errors import InvalidTensorError
from service.inference_protocol.messages import InputTensor, OutputTensor

LENGTH = struct.Struct("<I")  # before each element of BYTES
MAX_DIMENSIONS = 4


def num_elements(tensor: InputTensor) -> int:
    """Count the elements that a tensor's shape announces.

    Raises:
        InvalidTensorError: it is no shape.
    """
    shape = tensor.shape
    if not 1 <= len(shape) <= MAX_DIMENSIONS:
        raise InvalidTensorError(f"{tensor.name}: a shape of 1 to {MAX_DIMENSIONS} dimensions is wanted")
    if min(shape) < 1:
        raise InvalidTensorError(f"{tensor.name}: every dimension of the shape must be at least 1, as {shape} is not")
    return math.prod(shape)


def split_elements(name: str, raw: bytes | memoryview, number: int) -> list[bytes]:
    """Take the elements of BYTES out of their binary layout.

    Args:
        name: of the tensor.
        raw: each element after its length.
        number: of elements that the shape announces.

    Raises:
        InvalidTensorError: there are more or fewer, or an element is longer than what is left.
    """
    elements, start = [], 0
    for index in range(number):
        end = start + LENGTH.size
        if end > len(raw):
            raise InvalidTensorError(f"{name}: the shape announces {number} elements, and {index} are there")
        (length,) = LENGTH.unpack_from(raw, start)
        if length > len(raw) - end:
            raise InvalidTensorError(
                f"{name}: element {index} should have {length} bytes, and {len(raw) - end} are left"
            )
        elements.append(bytes(raw[end : end + length]))
        start = end + length
    if start < len(raw):
        raise InvalidTensorError(f"{name}: {len(raw) - start} bytes follow the {number} elements of the shape")
    return elements


def join_elements(elements: Iterable[bytes]) -> bytes:
    """Put elements of BYTES into their binary layout."""
    return b"".join(part for element in elements for part in (LENGTH.pack(len(element)), element))


def to_raw(tensor: OutputTensor) -> bytes:
    """Put a tensor of a reply into its binary layout."""
    if tensor.datatype == "BYTES":
        return join_elements(str(value).encode() for value in tensor.values)
    return tensor.contents.astype("<f4", copy=False).tobytes()
