"""Converts the protocol's values to and from gRPC messages. Checks only what is specific to gRPC."""

from collections.abc import Mapping, Sized

from service.errors import InvalidParameterError, InvalidTensorError
from service.inference_protocol.messages import (
    InferReply,
    InferRequest,
    InputTensor,
    OutputTensor,
    Parameter,
    Parameters,
    RequestedOutput,
)
from service.inference_protocol.tensors import MAX_DIMENSIONS, to_raw
from service.rpc import open_inference_pb2 as pb

MAX_TENSORS, MAX_PARAMETERS = 16, 64  # in one list or map; more are refused before they become objects
CONTENTS = {"BYTES": "bytes_contents", "UINT8": "uint_contents", "FP32": "fp32_contents"}


def read_request(message: pb.ModelInferRequest) -> InferRequest:
    """Read a request; the contents of its tensors are not converted.

    Raises:
        InvalidParameterError: a parameter has no value, or there are too many.
        InvalidTensorError: the raw contents do not match the inputs, or there are too many tensors.
    """
    require_few_tensors(message.inputs, message.outputs)
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise InvalidTensorError(
            f"raw_input_contents: must have one entry for each of {len(message.inputs)} inputs, not {len(raw)}"
        )
    return InferRequest(
        message.model_name,
        message.model_version,
        message.id,
        _read_parameters(message.parameters),
        tuple(_read_tensor(tensor, raw[index] if raw else None) for index, tensor in enumerate(message.inputs)),
        tuple(RequestedOutput(output.name, _read_parameters(output.parameters)) for output in message.outputs),
    )


def require_few_tensors(inputs: Sized, outputs: Sized) -> None:
    """Refuse a request with very many tensors.

    Raises:
        InvalidTensorError: there are more than MAX_TENSORS inputs or outputs.
    """
    for name, tensors in (("inputs", inputs), ("outputs", outputs)):
        if len(tensors) > MAX_TENSORS:
            raise InvalidTensorError(f"{name}: a request may have at most {MAX_TENSORS}, not {len(tensors)}")


def _read_tensor(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> InputTensor:
    if raw is not None and tensor.HasField("contents"):
        raise InvalidTensorError(f"{tensor.name}: give either contents or raw_input_contents, not both")
    contents = getattr(tensor.contents, CONTENTS[tensor.datatype]) if tensor.datatype in CONTENTS else ()
    shape = tuple(tensor.shape[: MAX_DIMENSIONS + 1])  # longer shapes are refused anyway
    parameters = _read_parameters(tensor.parameters)
    return InputTensor(tensor.name, tensor.datatype, shape, contents if raw is None else raw, parameters)


def _read_parameters(parameters: Mapping[str, pb.InferParameter]) -> Parameters:
    if len(parameters) > MAX_PARAMETERS:
        raise InvalidParameterError(f"at most {MAX_PARAMETERS} parameters are allowed, not {len(parameters)}")
    values: dict[str, Parameter] = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidParameterError(f"{name}: must have a value", parameter=name)
        values[name] = getattr(parameter, kind)
    return values


def write_reply(reply: InferReply, *, is_raw: bool) -> pb.ModelInferResponse:
    """Write a reply, with the tensors as bytes or as lists."""
    return pb.ModelInferResponse(
        model_name=reply.model_name,
        model_version=reply.model_version,
        id=reply.id,
        parameters={name: _write_parameter(value) for name, value in reply.parameters.items()},
        outputs=[_write_tensor(tensor, is_raw=is_raw) for tensor in reply.outputs],
        raw_output_contents=[to_raw(tensor) for tensor in reply.outputs] if is_raw else [],
    )


def _write_tensor(tensor: OutputTensor, *, is_raw: bool) -> pb.ModelInferResponse.InferOutputTensor:
    written = pb.ModelInferResponse.InferOutputTensor(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    if not is_raw and tensor.datatype == "BYTES":
        written.contents.bytes_contents.extend(str(value).encode() for value in tensor.values)
    elif not is_raw:
        written.contents.fp32_contents.extend(float(value) for value in tensor.values)
    return written


def _write_parameter(value: Parameter) -> pb.InferParameter:
    match value:
        case bool():
            return pb.InferParameter(bool_param=value)
        case int():
            return pb.InferParameter(int64_param=value)
        case float():
            return pb.InferParameter(double_param=value)
        case str():
            return pb.InferParameter(string_param=value)
