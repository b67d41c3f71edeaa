import pytest
from google.protobuf.message import Message

from service.rpc import open_inference_pb2 as pb
from service.rpc import tensorflow_serving_pb2 as tf
from service.rpc.wire_fields import MAX_FIELDS, count_fields
from tests.service.rpc.conftest import request_for


def count(message: Message) -> int:
    return count_fields(message.SerializeToString(), type(message))


def test_nested_fields_are_counted() -> None:
    assert count(pb.ModelInferRequest()) == 0
    assert count(pb.ModelInferRequest(model_name="tiny", id="7")) == 2
    # the parameter, its name, its value, and the field inside the value
    assert count(pb.ModelInferRequest(parameters={"top_k": pb.InferParameter(int64_param=-1)})) == 4
    assert count(pb.ModelInferRequest(parameters={"gflops": pb.InferParameter(double_param=1)})) == 4
    assert count(tf.TensorShapeProto(dim=[tf.TensorShapeProto.Dim(size=2)] * 3)) == 6


def test_a_list_of_pixels_is_one_field() -> None:
    assert count(pb.InferTensorContents(uint_contents=range(100_000), fp32_contents=[0.5] * 100_000)) == 2


@pytest.mark.parametrize(
    "contents",
    [
        pb.InferTensorContents(bool_contents=[True] * 500),
        pb.InferTensorContents(int_contents=[1] * 500),
        pb.InferTensorContents(int64_contents=[1] * 500),
        pb.InferTensorContents(uint64_contents=[1] * 500),
        pb.InferTensorContents(fp64_contents=[1.0] * 500),
        pb.ModelInferRequest.InferInputTensor(shape=[1] * 500),
    ],
)
def test_each_byte_of_another_list_of_numbers_is_a_field(contents: Message) -> None:
    """Nothing reads these lists, but a number of a byte takes up to eight in memory."""
    assert count(contents) >= 500


def test_the_contents_of_bytes_are_not_counted_as_fields() -> None:
    plain, crowded = request_for(b"", raw=True), request_for(b"\x2a\0" * 1000, raw=True)
    assert count(plain) == count(crowded)


def test_unknown_fields_of_every_type_are_counted() -> None:
    fields = b"\x78\x80\x01" + b"\x79" + bytes(8) + b"\x7a\x02ab" + b"\x7d" + bytes(4) + b"\x7b\x7c"
    assert count_fields(fields, pb.ModelInferRequest) == 6


@pytest.mark.parametrize("field", [b"\x2a\0", b"\x22\0", b"\x3a\0", b"\x7a\0", b"\x2a\x04\x2a\x02\x42\0"])
def test_counting_stops_soon_after_max_fields(field: bytes) -> None:
    assert MAX_FIELDS < count_fields(field * 100_000, pb.ModelInferRequest) <= MAX_FIELDS + 4


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",  # an unfinished tag
        b"\x08" + b"\xff" * 10,  # a number of more than 64 bits
        b"\x2a\x05ab",  # longer than the message
        b"\x0e",  # of an unknown type
    ],
)
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"cut off|too long|longer than|no such type"):
        count_fields(data, pb.ModelInferRequest)
