"""The routes of the Open Inference Protocol, as Triton, KServe, MLServer and OpenVINO Model Server have them."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from service.domain import Classification
from service.http.classify import Handle, timing_header
from service.http.context import RouteContext
from service.http.descriptions import describe_timing
from service.http.error_shapes import V2_PREFIX, InferError, describe_failures
from service.http.inference import InferenceOverHttp
from service.http.queries import describe_path
from service.http.v2_bodies import JSON_LENGTH_HEADER, InferBody, read_request, write_reply
from service.inference_protocol.protocol import InferenceProtocol

TAG = "Open Inference Protocol"


def infer_path(name: str) -> str:
    """Return the path of a model's inference without a version, which nearly all requests use."""
    return f"{V2_PREFIX}/models/{name}/infer"


def make_infer(context: RouteContext, protocol: InferenceProtocol) -> Handle:
    """Create the handler of POST /v2/models/{name}/infer."""
    over_http = InferenceOverHttp(context, protocol)

    async def infer(request: Request) -> Response:
        """Classify one image or several with the best sub-networks that budgets, load and machine allow now."""
        name, version = _model(request, context.checkpoint.name)
        json_length = request.headers.get(JSON_LENGTH_HEADER)
        message, reply = await over_http.answer(
            request, (name, version), lambda body: read_request(body, json_length, name, version)
        )
        return write_reply(reply, message, _timing(reply.answers))

    return infer


def build_v2_router(context: RouteContext, protocol: InferenceProtocol, infer: Handle) -> APIRouter:
    """Create the routes."""
    errors = describe_failures(InferError)
    router = APIRouter(prefix=V2_PREFIX, tags=[TAG], responses={404: {"model": InferError}})
    models = ("/models/{name}", "/models/{name}/versions/{version}")

    @router.get("")
    async def server_metadata() -> dict[str, Any]:
        """Return the server's name, its version and the protocol extensions that it supports."""
        return protocol.server_metadata()

    @router.head("/health/live", include_in_schema=False)
    @router.get("/health/live")
    async def live() -> dict[str, bool]:
        """Return 200 as long as the process answers."""
        return {"live": True}

    @router.head("/health/ready", include_in_schema=False)
    @router.get("/health/ready", responses={503: {"description": "not ready"}})
    async def ready() -> JSONResponse:
        """Return whether the server is ready: it takes requests, and they do not all fail."""
        return _readiness(protocol)

    @router.get("/models/stats")
    async def all_statistics() -> dict[str, Any]:
        """Return Triton's statistics over all requests, whatever their route."""
        return await asyncio.to_thread(protocol.statistics)

    @router.post("/repository/index")
    async def repository_index() -> list[dict[str, Any]]:
        """List the one served model."""
        return protocol.repository_index()

    async def model_metadata(request: Request) -> dict[str, Any]:
        """Describe the model's inputs and outputs."""
        return protocol.model_metadata(*_model(request, context.checkpoint.name))

    async def model_ready(request: Request) -> JSONResponse:
        """Return whether the model is ready: it takes requests, and they do not all fail."""
        name, version = _model(request, context.checkpoint.name)
        protocol.require_model(name, version)
        return _readiness(protocol, {"name": name})

    async def model_config(request: Request) -> dict[str, Any]:
        """Return the model's configuration in Triton's format."""
        return protocol.model_config(*_model(request, context.checkpoint.name))

    async def model_statistics(request: Request) -> dict[str, Any]:
        """Return Triton's statistics over all requests, whatever their route."""
        return await asyncio.to_thread(protocol.statistics, *_model(request, context.checkpoint.name))

    for path in models:
        described = {"parameters": describe_path(path)}
        router.add_api_route(path, model_metadata, openapi_extra=described)
        for suffix, handle in (("ready", model_ready), ("config", model_config), ("stats", model_statistics)):
            router.add_api_route(f"{path}/{suffix}", handle, openapi_extra=described)
        body = {"application/json": {"schema": InferBody.model_json_schema()}, "application/octet-stream": {}}
        router.add_api_route(
            f"{path}/infer",
            infer,
            methods=["POST"],
            responses=errors,
            openapi_extra={**described, "requestBody": {"required": True, "content": body}},
        )
    return router


def _model(request: Request, default: str) -> tuple[str, str]:
    """Return the model's name and version from the path; the version is "" where there is none."""
    names = request.path_params
    return names.get("name", default), names.get("version", "")


def _readiness(protocol: InferenceProtocol, described: dict[str, Any] | None = None) -> JSONResponse:
    is_ready = protocol.is_ready()
    return JSONResponse({**(described or {}), "ready": is_ready}, 200 if is_ready else 503)


def _timing(answers: tuple[Classification, ...]) -> dict[str, str]:
    return timing_header(describe_timing(answers[0].timing)) if len(answers) == 1 else {}
