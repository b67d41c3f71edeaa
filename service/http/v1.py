"""TensorFlow Serving's REST API, KServe's v1, as ovmsclient uses it: JSON bodies, parameters in query and headers."""

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from pydantic_core import to_json

from service.errors import InvalidTensorError
from service.http.classify import Handle
from service.http.context import RouteContext
from service.http.error_shapes import V1_PREFIX, InferError, describe_failures
from service.http.inference import InferenceOverHttp
from service.http.large_json import LARGE_BYTES, take_numbers
from service.http.queries import describe_path
from service.inference_protocol.descriptions import VERSION
from service.inference_protocol.images import CHANNELS, INPUT
from service.inference_protocol.messages import InferReply, InferRequest, InputTensor, Values
from service.inference_protocol.protocol import InferenceProtocol
from service.request_parameters import validated

TAG = "TensorFlow Serving"
LATEST_VERSION = "0"  # ovmsclient's name for it
DTYPES = {"BYTES": "DT_STRING", "FP32": "DT_FLOAT"}
SIGNATURE = "serving_default"


class PredictBody(BaseModel):
    """Body of POST /v1/models/{name}:predict."""

    instances: list[Any] | None = Field(
        None, description="images, one per row of the answer: base64, `b64` objects or pixels"
    )
    inputs: Any = Field(None, description=f"the same in columnar format, alone or as {INPUT}")


def make_v1_predict(context: RouteContext, protocol: InferenceProtocol) -> Handle:
    """Create the handler of POST /v1/models/{name}:predict."""
    over_http = InferenceOverHttp(context, protocol)

    async def predict(request: Request) -> Response:
        """Classify one image or several. Budgets and other parameters are in the query or in headers."""
        model, is_by_row = _model(request), False

        async def parse(data: bytes) -> InferRequest:
            nonlocal is_by_row
            body, numbers = await _parsed(data)
            is_by_row = body.instances is not None
            image = _tensor(body, numbers, context.checkpoint.config.image_side)
            return InferRequest(*model, "", {}, (image,))

        _, reply = await over_http.answer(request, model, parse)
        columns = {output.name: output.contents.tolist() for output in reply.outputs}
        answer = {"predictions": _rows(reply, columns)} if is_by_row else {"outputs": columns}
        return Response(to_json(answer), media_type="application/json")

    return predict


def build_v1_router(protocol: InferenceProtocol, predict: Handle) -> APIRouter:
    """Create the routes."""
    router = APIRouter(prefix=V1_PREFIX, tags=[TAG], responses={404: {"model": InferError}})

    async def status(request: Request) -> dict[str, Any]:
        """Return the state of the model: AVAILABLE while the server is ready, else LOADING."""
        (name, version), is_ready = _model(request), protocol.is_ready()
        protocol.require_model(name, version)
        state = {
            "version": VERSION,
            "state": "AVAILABLE" if is_ready else "LOADING",
            "status": {"error_code": "OK", "error_message": ""},
        }
        return {"name": name, "ready": is_ready, "model_version_status": [state]}

    async def metadata(request: Request) -> dict[str, Any]:
        """Describe the model's inputs and outputs."""
        tensors = protocol.model_metadata(*_model(request))
        signature = {
            kind: {tensor["name"]: _signature(tensor) for tensor in tensors[kind]} for kind in ("inputs", "outputs")
        }
        return {
            "modelSpec": {"name": tensors["name"], "signatureName": "", "version": VERSION},
            "metadata": {"signature_def": {"signatureDef": {SIGNATURE: signature}}},
        }

    body = {"required": True, "content": {"application/json": {"schema": PredictBody.model_json_schema()}}}
    errors = describe_failures(InferError)
    for path in ("/models/{name}", "/models/{name}/versions/{version}"):
        parameters: dict[str, Any] = {"parameters": describe_path(path)}
        router.add_api_route(f"{path}/metadata", metadata, openapi_extra=parameters)
        router.add_api_route(
            f"{path}:predict",
            predict,
            methods=["POST"],
            responses=errors,
            openapi_extra={"requestBody": body, **parameters},
        )
        router.add_api_route(path, status, openapi_extra=parameters)
    return router


def _model(request: Request) -> tuple[str, str]:
    """Return the model's name and version from the path; the version is "" for the latest."""
    version = request.path_params.get("version", "")
    return request.path_params["name"], "" if version == LATEST_VERSION else version


async def _parsed(body: bytes) -> tuple[PredictBody, list[Values]]:
    """Parse a body. Of a large one, lists of pixels are returned separately, and are empty in the parsed body."""
    numbers = list[Values]()
    if len(body) > LARGE_BYTES:
        body, numbers = await take_numbers(body, ("instances", "inputs", INPUT))
    return validated(PredictBody, body), numbers


def _tensor(body: PredictBody, numbers: list[Values], side: int) -> InputTensor:
    """Create the input tensor from the rows of `instances` or the column of `inputs`, which may be a single image."""
    values = body.inputs if body.instances is None else body.instances
    if isinstance(values, dict) and INPUT in values:
        values = values[INPUT]
    if values == [] and len(numbers) == 1:
        number = max(1, len(numbers[0]) // (CHANNELS * side * side))
        return InputTensor(INPUT, "FP32", (number, CHANNELS, side, side), numbers[0])
    if not isinstance(values, list):
        values = [values]
    images = [_unwrapped(value) for value in values]
    if not images or None in images or images.count([]) != len(numbers):
        raise InvalidTensorError(f"{INPUT}: instances or inputs must hold images")
    if isinstance(images[0], str):
        return InputTensor(INPUT, "BYTES", (len(images),), images)
    if numbers:
        rest = iter(numbers)
        images = [next(rest) if image == [] else image for image in images]
        return InputTensor(INPUT, "FP32", (len(images), CHANNELS, side, side), images)
    return InputTensor(INPUT, "FP32", _shape(images), images)


def _unwrapped(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Unwrap an image from the object that a row may be, and base64 from its `b64` object."""
    for name in (INPUT, "b64"):
        if isinstance(value, dict) and list(value) == [name]:
            value = value[name]
    return value


def _shape(values: Any) -> tuple[int, ...]:  # noqa: ANN401 - JSON
    """Return the shape of nested lists, from the first element at each depth."""
    shape = []
    while isinstance(values, list) and values:
        shape.append(len(values))
        values = values[0]
    return tuple(shape)


def _rows(reply: InferReply, columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [{name: column[row] for name, column in columns.items()} for row in range(len(reply.answers))]


def _signature(tensor: dict[str, Any]) -> dict[str, Any]:
    # Sizes are strings, as are all 64-bit integers in the JSON of protocol buffers.
    dimensions = [{"size": str(size), "name": ""} for size in tensor["shape"]]
    return {"dtype": DTYPES[tensor["datatype"]], "tensorShape": {"dim": dimensions, "unknownRank": False}}
