"""TorchServe's routes for predictions and for its health check."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic_core import to_json

from service.errors import InvalidParameterError
from service.http.classify import Handle, read_upload, timing_header
from service.http.context import RouteContext
from service.http.descriptions import describe_timing
from service.http.disconnects import ClientWatch
from service.http.error_shapes import TorchServeError, describe_failures
from service.http.keys import key_of
from service.http.queries import describe_path
from service.inference_protocol.protocol import InferenceProtocol
from service.telemetry.outcomes import counting_failures

TAG = "TorchServe"
IMAGE_FIELDS = ("data", "body")


def predict_path(name: str) -> str:
    """Return the path of a model's predictions without a version, which nearly all requests use."""
    return f"/predictions/{name}"


def make_predict(context: RouteContext, protocol: InferenceProtocol) -> Handle:
    """Create the handler of POST /predictions/{name}."""

    async def predict(request: Request) -> Response:
        """Classify an image, sent as the body or as the form field `data`; return labels with probabilities."""
        watch, names = ClientWatch(request), request.path_params
        with counting_failures(context.metrics, key_of(request.scope)):
            protocol.require_model(names.get("name", context.checkpoint.name), names.get("version", ""))
            upload = await read_upload(context, request, watch, IMAGE_FIELDS)
            if len(upload.reads) > 1:
                raise InvalidParameterError("only one image per request is supported on this route")
        with context.failures.counting():
            answer = await context.classifier.classify(upload.server.pipeline, upload.reads[0], upload.wanted, watch)
        probabilities: dict[str, float] = {}
        for prediction in answer.predictions:  # the most probable first; several classes may have one name
            probabilities.setdefault(prediction.label, prediction.probability)
        timing = timing_header(describe_timing(answer.timing))
        return Response(to_json(probabilities), headers=timing, media_type="application/json")

    return predict


def build_torchserve_router(protocol: InferenceProtocol, predict: Handle) -> APIRouter:
    """Create the routes."""
    router = APIRouter(tags=[TAG])
    errors = describe_failures(TorchServeError)
    image = {"schema": {"type": "string", "format": "binary"}}
    body = {"required": True, "content": {"image/*": image, "application/octet-stream": image}}
    for path in (predict_path("{name}"), predict_path("{name}/{version}")):
        router.add_api_route(
            path,
            predict,
            methods=["POST"],
            response_model=dict[str, float],
            responses=errors,
            openapi_extra={"requestBody": body, "parameters": describe_path(path)},
        )
        router.add_api_route(path, predict, methods=["PUT"], include_in_schema=False)  # as `curl -T` sends it

    @router.head("/ping", include_in_schema=False)
    @router.get("/ping", responses={500: {"description": "not ready"}})
    async def ping() -> JSONResponse:
        """Return whether the server is ready, in the format of TorchServe's health check."""
        is_ready = protocol.is_ready()
        return JSONResponse({"status": "Healthy" if is_ready else "Unhealthy"}, 200 if is_ready else 500)

    return router
