import numpy as np
import pytest

from service.errors import InvalidTensorError
from service.inference_protocol.messages import InputTensor, OutputTensor
from service.inference_protocol.tensors import join_elements, num_elements, split_elements, to_raw


def of_shape(*shape: int) -> InputTensor:
    return InputTensor("image", "BYTES", shape, b"")


def test_the_elements_of_a_shape_are_counted() -> None:
    assert num_elements(of_shape(2, 3, 4, 5)) == 120


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1, 1), (0,), (2, -1), (0, 2**62)])
def test_an_invalid_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidTensorError, match=r"^image: "):
        num_elements(of_shape(*shape))


def test_each_element_follows_its_length_in_four_bytes() -> None:
    assert join_elements([b"ab", b""]) == b"\x02\0\0\0ab\0\0\0\0"
    assert split_elements("image", memoryview(b"\x02\0\0\0ab\0\0\0\0"), 2) == [b"ab", b""]


@pytest.mark.parametrize(
    ("raw", "number", "sentence"),
    [
        (b"", 1, "the shape has 1 elements, but the data has 0"),
        (b"\x01\0\0\0a\x01\0", 2, "the shape has 2 elements, but the data has 1"),
        (b"\x03\0\0\0ab", 1, "element 0 must have 3 bytes, but only 2 are left"),
        (b"\xff\xff\xff\xff", 1, "element 0 must have 4294967295 bytes, but only 0 are left"),
        (b"\x01\0\0\0abc", 1, "2 bytes follow the 1 elements of the shape"),
    ],
)
def test_lengths_that_do_not_match_the_data_are_refused(raw: bytes, number: int, sentence: str) -> None:
    with pytest.raises(InvalidTensorError) as caught:
        split_elements("image", raw, number)
    assert caught.value.message == f"image: {sentence}"


def test_outputs_are_encoded_row_by_row_in_little_endian_order() -> None:
    numbers = OutputTensor("probabilities", "FP32", np.array([[1.0, 0.5]], ">f4"))
    assert to_raw(numbers) == b"\0\0\x80\x3f\0\0\0\x3f"
    assert (
        to_raw(OutputTensor("labels", "BYTES", np.array([["ß", "b"]], np.object_))) == b"\x02\0\0\0\xc3\x9f\x01\0\0\0b"
    )
