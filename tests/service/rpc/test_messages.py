import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet

from service.errors import InvalidParameterError, InvalidTensorError
from service.inference_protocol.messages import InferReply, OutputTensor, Parameters
from service.rpc import open_inference_pb2 as pb
from service.rpc import tensorflow_serving_pb2
from service.rpc.messages import read_request, write_reply

ROOT = Path(__file__).parents[3]
# Runs in a separate process: one process can hold only one set of messages of these names.
TRITONS = """
import sys
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from tritonclient.grpc import model_config_pb2, service_pb2
files = FileDescriptorSet()
for module in (model_config_pb2, service_pb2):
    module.DESCRIPTOR.CopyToProto(files.file.add())
sys.stdout.buffer.write(files.SerializeToString())
"""


def own_file() -> FileDescriptorProto:
    described = FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(described)
    return described


def fields_of(message: DescriptorProto, prefix: str = "") -> set[tuple[str, str, int, int, int, str]]:
    """Return the fields of a message and its nested messages: their format on the wire, and their names."""
    name = f"{prefix}{message.name}"
    fields = {(name, field.name, field.number, field.type, field.label, field.type_name) for field in message.field}
    return fields.union(*(fields_of(nested, f"{name}.") for nested in message.nested_type))


@pytest.mark.parametrize("module", [pb, tensorflow_serving_pb2])
def test_the_generated_modules_match_the_proto_definitions(module: ModuleType, tmp_path: Path) -> None:
    made, described = tmp_path / "set", FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(described)
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", f"--descriptor_set_out={made}", described.name]
    subprocess.run(command, cwd=ROOT, check=True)
    (file,) = FileDescriptorSet.FromString(made.read_bytes()).file
    lines = [line for line in str(file).splitlines() if "json_name" not in line]  # only protoc writes these
    assert lines == str(described).splitlines()


def test_the_wire_format_is_that_of_tritons_clients() -> None:
    done = subprocess.run([sys.executable, "-c", TRITONS], check=True, capture_output=True)
    files = FileDescriptorSet.FromString(done.stdout).file
    theirs = set().union(*(fields_of(message) for file in files for message in file.message_type))
    ours = set().union(*(fields_of(message) for message in own_file().message_type))
    assert ours <= theirs
    methods = {(method.name, method.input_type, method.output_type) for method in files[1].service[0].method}
    (service,) = own_file().service
    assert service.name == files[1].service[0].name
    assert {(method.name, method.input_type, method.output_type) for method in service.method} <= methods
    types = {(value.name, value.number) for value in files[0].enum_type[0].value}
    assert {(value.name, value.number) for value in own_file().enum_type[0].value} == types


def test_parameters_keep_their_types() -> None:
    message = pb.ModelInferRequest(
        parameters={
            "yes": pb.InferParameter(bool_param=True),
            "whole": pb.InferParameter(int64_param=-1),
            "large": pb.InferParameter(uint64_param=2**63),
            "real": pb.InferParameter(double_param=0.5),
            "text": pb.InferParameter(string_param="a"),
        }
    )
    assert read_request(message).parameters == {"yes": True, "whole": -1, "large": 2**63, "real": 0.5, "text": "a"}


def test_a_parameter_without_a_value_is_refused_and_named() -> None:
    message = pb.ModelInferRequest(parameters={"top_k": pb.InferParameter()})
    with pytest.raises(InvalidParameterError, match="top_k: must have a value"):
        read_request(message)


def test_raw_contents_are_assigned_to_the_inputs_in_their_order() -> None:
    message = pb.ModelInferRequest(raw_input_contents=[b"first", b"second"])
    message.inputs.add(name="a", datatype="UINT8", shape=[5])
    message.inputs.add(name="b", datatype="UINT8", shape=[6])
    assert [(tensor.name, tensor.contents) for tensor in read_request(message).inputs] == [
        ("a", b"first"),
        ("b", b"second"),
    ]


def test_raw_contents_without_an_input_are_refused() -> None:
    with pytest.raises(InvalidTensorError, match="one entry for each of 0 inputs, not 1"):
        read_request(pb.ModelInferRequest(raw_input_contents=[b"lost"]))


def test_contents_together_with_raw_contents_are_refused() -> None:
    message = pb.ModelInferRequest(raw_input_contents=[b"raw"])
    message.inputs.add(name="a", datatype="UINT8", shape=[3]).contents.uint_contents.extend([1, 2, 3])
    with pytest.raises(InvalidTensorError, match="give either contents or raw_input_contents"):
        read_request(message)


def test_a_datatype_without_its_own_list_has_no_contents() -> None:
    message = pb.ModelInferRequest()
    message.inputs.add(name="a", datatype="FP16", shape=[3])
    assert not read_request(message).inputs[0].contents


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_too_many_tensors_are_refused(kind: str) -> None:
    message = pb.ModelInferRequest()
    for _ in range(17):
        getattr(message, kind).add(name="a")
    with pytest.raises(InvalidTensorError, match=f"{kind}: a request may have at most 16, not 17"):
        read_request(message)


@pytest.mark.parametrize("kind", ["request", "inputs", "outputs"])
def test_too_many_parameters_are_refused(kind: str) -> None:
    message = pb.ModelInferRequest()
    parameters = message.parameters if kind == "request" else getattr(message, kind).add(name="a").parameters
    for number in range(65):
        parameters[str(number)].bool_param = True
    with pytest.raises(InvalidParameterError, match="at most 64 parameters are allowed, not 65"):
        read_request(message)


def test_no_more_of_a_shape_is_read_than_shows_that_it_is_too_long() -> None:
    message = pb.ModelInferRequest()
    message.inputs.add(name="a", datatype="BYTES", shape=[1] * 1000)
    assert read_request(message).inputs[0].shape == (1,) * 5


def test_a_reply_has_every_value_of_its_tensors_and_parameters() -> None:
    tensors = (
        OutputTensor("probabilities", "FP32", np.array([[0.25, 0.75]], np.float32)),
        OutputTensor("labels", "BYTES", np.array([["cat", "dög"]], np.object_)),
    )
    parameters: Parameters = {"sure": True, "looks": 2, "gflops": 0.5, "reason": "so"}
    reply = InferReply("model", "1", "7", parameters, tensors, ())
    listed = write_reply(reply, is_raw=False)
    assert [list(tensor.shape) for tensor in listed.outputs] == [[1, 2], [1, 2]]
    assert list(listed.outputs[0].contents.fp32_contents) == [0.25, 0.75]
    assert list(listed.outputs[1].contents.bytes_contents) == [b"cat", "dög".encode()]
    assert listed.parameters["sure"].bool_param
    assert listed.parameters["looks"].int64_param == 2
    assert listed.parameters["gflops"].double_param == 0.5
    assert listed.parameters["reason"].string_param == "so"
    raw = write_reply(reply, is_raw=True)
    assert raw.raw_output_contents[0] == np.array([0.25, 0.75], "<f4").tobytes()
    assert raw.raw_output_contents[1] == b"\x03\0\0\0cat\x04\0\0\0" + "dög".encode()
