from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from service.decoding.images import OpenedImage
from service.domain import MAX_IMAGES
from service.errors import InvalidTensorError
from service.inference_protocol.images import images_of
from service.inference_protocol.messages import InputTensor
from service.inference_protocol.tensors import join_elements

SIDE = 2
PIXELS = np.arange(2 * 3 * SIDE * SIDE, dtype=np.uint8).reshape(2, 3, SIDE, SIDE) * 10


def decoded(datatype: str, contents: Any, shape: tuple[int, ...] = PIXELS.shape) -> torch.Tensor:  # noqa: ANN401 - lists
    images = images_of(InputTensor("image", datatype, shape, contents), SIDE)
    assert all(isinstance(image, OpenedImage) for image in images)
    return torch.stack([image.decode() for image in images if isinstance(image, OpenedImage)])


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
@pytest.mark.parametrize("contents", [join_elements([b"a", b"b"]), [b"a", b"b"], [[b"a"], [b"b"]]])
def test_files_are_split_into_one_image_each(contents: Any, shape: tuple[int, ...]) -> None:  # noqa: ANN401 - lists
    assert images_of(InputTensor("image", "BYTES", shape, contents), SIDE) == [b"a", b"b"]


def test_a_text_element_is_returned_undecoded() -> None:
    assert images_of(InputTensor("image", "BYTES", (1,), ["/9j/"]), SIDE) == ["/9j/"]


@pytest.mark.parametrize(
    "contents", [PIXELS.tobytes(), memoryview(PIXELS.tobytes()), PIXELS.ravel().tolist(), PIXELS.tolist()]
)
def test_uint8_pixels_are_decoded_unchanged(contents: Any) -> None:  # noqa: ANN401 - lists
    assert torch.equal(decoded("UINT8", contents), torch.from_numpy(PIXELS))


@pytest.mark.parametrize(("datatype", "dtype"), [("UINT8", "u1"), ("FP32", "<f4")])
def test_a_decoded_image_owns_its_memory_and_does_not_keep_its_message(datatype: str, dtype: str) -> None:
    message = bytearray(np.ones(PIXELS.shape, dtype))
    images = images_of(InputTensor("image", datatype, PIXELS.shape, memoryview(message)), SIDE)
    made = [image.decode() for image in images if isinstance(image, OpenedImage)]
    message[:] = bytes(len(message))
    assert all(image.all() for image in made)
    assert [image.untyped_storage().nbytes() for image in made] == 2 * [3 * SIDE * SIDE]


def test_pixels_scaled_to_one_are_restored_exactly() -> None:
    every = np.arange(256, dtype=np.uint8)
    pixels = np.concatenate([every] * 3).reshape(1, 3, 16, 16)
    scaled = (pixels / np.float32(255)).astype("<f4")
    for contents in (scaled.tobytes(), scaled.ravel().tolist(), scaled.tolist()):
        [image] = images_of(InputTensor("image", "FP32", pixels.shape, contents), 16)
        assert isinstance(image, OpenedImage)
        assert torch.equal(image.decode(), torch.from_numpy(pixels[0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.01, 1.01, 255.0])
def test_fp32_values_outside_zero_to_one_are_refused(value: float) -> None:
    pixels = np.full((1, 3, SIDE, SIDE), 0.5, np.float32)
    pixels[0, 1, 0, 0] = value
    for contents in (pixels.tobytes(), pixels.ravel().tolist()):
        with pytest.raises(InvalidTensorError, match="normalised by the server"):
            decoded("FP32", contents, pixels.shape)


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_numbers_written_as_text_are_refused(datatype: str) -> None:
    pixels = np.ones((1, 3, SIDE, SIDE)).astype(object)
    pixels[0, 1, 0, 0] = "1"
    for contents in (pixels.ravel().tolist(), pixels.tolist(), ["1"]):
        with pytest.raises(InvalidTensorError, match=f"values of {datatype} must be numbers"):
            decoded(datatype, contents, pixels.shape)


@pytest.mark.parametrize("value", [-1, 256, 0.5, "x", None, 2**70, float("nan"), [1], "1" * 1000])
def test_uint8_values_that_are_no_bytes_are_refused(value: object) -> None:
    values: list[object] = [0] * (3 * SIDE * SIDE)
    values[5] = value
    with pytest.raises(InvalidTensorError, match=r"^image: values of UINT8 must be (integers|numbers)"):
        decoded("UINT8", values, (1, 3, SIDE, SIDE))


@pytest.mark.parametrize(
    ("datatype", "shape", "contents", "sentence"),
    [
        ("INT64", (1,), b"", "the datatype INT64 is not supported; choose from BYTES, UINT8, FP32"),
        ("BYTES", (1, 2), b"", r"the shape for BYTES must be \(N\) or \(N, 1\), not \(1, 2\)"),
        ("BYTES", (MAX_IMAGES + 1,), b"", "a request may have at most 16 images, not 17"),
        ("BYTES", (2,), [b"a"], "the shape has 2 elements, but the data has 1"),
        ("BYTES", (1,), [7], "elements of BYTES must be base64 strings"),
        ("UINT8", (3, SIDE, SIDE), b"", r"the shape for UINT8 must be \(N, 3, 2, 2\)"),
        ("FP32", (1, SIDE, SIDE, 3), b"", r"the shape for FP32 must be \(N, 3, 2, 2\)"),
        ("UINT8", (1, 3, SIDE, SIDE), bytes(11), "the data must have 12 bytes of UINT8, not 11"),
        ("FP32", (1, 3, SIDE, SIDE), bytes(12), "the data must have 48 bytes of FP32, not 12"),
        ("FP32", (1, 3, SIDE, SIDE), [0.5] * 11, "the data must have 12 values, not 11"),
        ("FP32", (1, 3, SIDE, SIDE), [[0.5] * 11], "an image must have 12 values, not 11"),
        ("FP32", (1, 3, SIDE, SIDE), [[[0.5], [0.5, 0.5]]], "values of FP32 must be numbers in lists of equal lengths"),
    ],
)
def test_an_invalid_input_tensor_gets_a_message_that_names_the_fault(
    datatype: str,
    shape: tuple[int, ...],
    contents: Any,  # noqa: ANN401 - lists
    sentence: str,
) -> None:
    with pytest.raises(InvalidTensorError, match=f"^image: .*{sentence}"):
        decoded(datatype, contents, shape)


class Unread(list[object]):
    def __iter__(self) -> Iterator[object]:
        raise AssertionError("nothing is to be read")


def test_more_files_than_the_shape_declares_are_refused_without_being_read() -> None:
    with pytest.raises(InvalidTensorError, match="the shape has 2 elements, but the data has 3"):
        images_of(InputTensor("image", "BYTES", (2,), Unread([b"a", b"b", b"c"])), SIDE)


def test_unknown_inputs_and_shared_memory_are_refused() -> None:
    with pytest.raises(InvalidTensorError, match="INPUT0: unknown input"):
        images_of(InputTensor("INPUT0", "BYTES", (1,), [b"a"]), SIDE)
    with pytest.raises(InvalidTensorError, match="shared memory is not supported"):
        images_of(InputTensor("image", "BYTES", (1,), b"", {"shared_memory_region": "x"}), SIDE)
