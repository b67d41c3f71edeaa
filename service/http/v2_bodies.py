"""Bodies of the Open Inference Protocol: JSON, followed by the binary tensors of Triton's extension."""

import zlib
from collections.abc import Mapping
from typing import Any

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from service.errors import BodyTooLargeError, InvalidParameterError, InvalidTensorError, UnsupportedMediaError
from service.http.large_json import LARGE_BYTES, take_numbers
from service.inference_protocol.images import INPUT
from service.inference_protocol.messages import InferReply, InferRequest, InputTensor, RequestedOutput, Values
from service.inference_protocol.tensors import to_raw
from service.request_parameters import validated

JSON_LENGTH_HEADER = "Inference-Header-Content-Length"
SIZE, BINARY, ALL_BINARY = "binary_data_size", "binary_data", "binary_data_output"
MAX_DIGITS = 18  # of the header; Python refuses to parse thousands of digits
WINDOW_BITS = {"gzip": 31, "deflate": 15}  # wbits of zlib, by content encoding


class TensorBody(BaseModel):
    """An input tensor of a request."""

    model_config = ConfigDict(strict=True)

    name: str
    datatype: str = Field(description="BYTES, UINT8 or FP32")
    shape: list[int]
    parameters: dict[str, Any] | None = Field(None, description=f"{SIZE}: bytes of the tensor after the JSON")
    data: list[Any] | None = Field(None, description="values, flat or nested; base64 for BYTES")


class OutputBody(BaseModel):
    """An output that a request asks for."""

    model_config = ConfigDict(strict=True)

    name: str
    parameters: dict[str, Any] | None = Field(None, description=f"{BINARY}, classification")


class InferBody(BaseModel):
    """Body of POST /v2/models/{name}/infer."""

    model_config = ConfigDict(strict=True)

    id: str | None = Field(None, description="returned with the answer")
    parameters: dict[str, Any] | None = Field(
        None, description=f"those of the query; timeout in microseconds; {ALL_BINARY}"
    )
    inputs: list[TensorBody] = Field(description=f"exactly one, named {INPUT}")
    outputs: list[OutputBody] | None = Field(None, description="all outputs if none is named")


def undo_encoding(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Decode the content encoding of a body.

    Args:
        body: the body as received.
        encoding: identity, gzip or deflate; Triton's clients use the latter two.
        max_bytes: longest decoded body.

    Raises:
        UnsupportedMediaError: the encoding is another one.
        BodyTooLargeError: the decoded body is longer; at most one byte beyond the limit was decoded.
        InvalidTensorError: the body is not in this encoding, is cut off, or is followed by other bytes.
    """
    if encoding in ("", "identity"):
        return body
    if encoding not in WINDOW_BITS:
        raise UnsupportedMediaError(f"the content encoding {encoding} is not supported; use gzip, deflate or none")
    inflating = zlib.decompressobj(WINDOW_BITS[encoding])
    try:
        undone = inflating.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise InvalidTensorError(f"the body is not valid {encoding}") from error
    if len(undone) > max_bytes:
        raise BodyTooLargeError(f"the decoded body is longer than {max_bytes} bytes", max_body_bytes=max_bytes)
    if not inflating.eof:
        raise InvalidTensorError(f"the body is truncated: its {encoding} stream has no end")
    if inflating.unused_data:
        message = f"{len(inflating.unused_data)} bytes follow the end of the {encoding} stream; only one is supported"
        raise InvalidTensorError(message)
    return undone


async def read_request(body: bytes, json_length: str | None, model_name: str, model_version: str) -> InferRequest:
    """Parse the body of a request.

    Args:
        body: the whole body.
        json_length: the header JSON_LENGTH_HEADER; None where all is JSON. At 0 the body is one image and nothing else.
        model_name: from the path.
        model_version: from the path; "" for none.

    Raises:
        InvalidParameterError: the JSON is not a valid request, or the header is unusable.
        InvalidTensorError: a tensor has no data, or the bytes after the JSON do not match the sizes that it states.
    """
    length = _json_length(json_length, len(body))
    if json_length is not None and length == 0:
        image = InputTensor(INPUT, "BYTES", (1,), (body,))
        return InferRequest(model_name, model_version, "", {}, (image,))
    rest, start, inputs = memoryview(body), length, []
    parsed, numbers = await _parsed(rest[:length])
    for tensor in parsed.inputs:
        size = (tensor.parameters or {}).get(SIZE)
        if size is not None:
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(body) - start:
                raise InvalidTensorError(f"{tensor.name}: {SIZE} must be 0 to the number of bytes left in the body")
            inputs.append(_input(tensor, rest[start : start + size]))
            start += size
        elif tensor.data is not None:
            inputs.append(_input(tensor, numbers.pop(0) if numbers and not tensor.data else tensor.data))
        else:
            raise InvalidTensorError(f"{tensor.name}: must have data or {SIZE}")
    if numbers:
        raise InvalidParameterError("numbers are allowed as `data` only in the inputs")
    if start < len(body):
        raise InvalidTensorError(f"{len(body) - start} bytes follow the tensors of the request")
    outputs = tuple(RequestedOutput(output.name, output.parameters or {}) for output in parsed.outputs or ())
    return InferRequest(model_name, model_version, parsed.id or "", parsed.parameters or {}, tuple(inputs), outputs)


async def _parsed(text: memoryview) -> tuple[InferBody, list[Values]]:
    """Parse the JSON. Of a large one, numeric tensor data is returned separately, and is empty in the parsed body."""
    rest, numbers = bytes(text), list[Values]()
    if len(rest) > LARGE_BYTES:
        rest, numbers = await take_numbers(rest, ("data",))
    return validated(InferBody, rest), numbers


def _json_length(header: str | None, body_bytes: int) -> int:
    if header is None:
        return body_bytes
    is_number = header.isascii() and header.isdigit() and len(header) <= MAX_DIGITS
    if not is_number or int(header) > body_bytes:
        raise InvalidParameterError(f"{JSON_LENGTH_HEADER}: must be the length of the JSON at the start of the body")
    return int(header)


def _input(tensor: TensorBody, contents: memoryview | Values) -> InputTensor:
    return InputTensor(tensor.name, tensor.datatype, tuple(tensor.shape), contents, tensor.parameters or {})


def write_reply(reply: InferReply, request: InferRequest, headers: Mapping[str, str] | None = None) -> Response:
    """Serialise a reply: the outputs that the request wants binary follow the JSON, the others are in it."""
    wanted = {output.name: output.parameters for output in request.outputs}
    default = request.parameters.get(ALL_BINARY, False)
    outputs, tail = [], list[bytes]()
    for tensor in reply.outputs:
        described: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if wanted.get(tensor.name, {}).get(BINARY, default):
            tail.append(to_raw(tensor))
            described["parameters"] = {SIZE: len(tail[-1])}
        else:
            described["data"] = tensor.values
        outputs.append(described)
    described = {"model_name": reply.model_name, "model_version": reply.model_version}
    if reply.id:
        described["id"] = reply.id
    head = to_json(described | {"parameters": reply.parameters, "outputs": outputs})
    if not tail:
        return Response(head, headers=dict(headers or {}), media_type="application/json")
    headers = {**(headers or {}), JSON_LENGTH_HEADER: str(len(head))}
    return Response(b"".join((head, *tail)), headers=headers, media_type="application/octet-stream")
