"""The HTTP routes: requests in, answers out, and the one table from error type to status."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from models.checkpoint import Checkpoint
from service.domain import Classification, InferenceRequest
from service.errors import (
    BodyTooLargeError,
    BudgetTooSmallError,
    ClientGoneError,
    ImageTooLargeError,
    InvalidImageError,
    InvalidParameterError,
    ModelError,
    NotReadyError,
    OverloadedError,
    ServiceError,
    UnsupportedMediaError,
    UploadTimeoutError,
)
from service.metrics import CONTENT_TYPE, Metrics
from service.pipeline import Pipeline
from service.schemas import (
    ClassifyAnswer,
    ClassifyQuery,
    ErrorAnswer,
    ErrorDetail,
    HealthAnswer,
    SubNetworksAnswer,
    describe_answer,
    describe_family,
)
from service.uploads import read_image, wait_until_gone

STATUS = {
    InvalidParameterError: 422,
    BudgetTooSmallError: 422,
    InvalidImageError: 422,
    ImageTooLargeError: 413,
    BodyTooLargeError: 413,
    UploadTimeoutError: 408,
    ClientGoneError: 499,  # nobody reads it; the log of accesses and the metrics do
    UnsupportedMediaError: 415,
    OverloadedError: 429,
    NotReadyError: 503,
    ModelError: 500,
}
CLASSIFY_PATH = "/classify"
RETRY_AFTER_S = 1
LINGER_S = 1


@dataclass(frozen=True, slots=True)
class Api:
    """What the routes call upon."""

    checkpoint: Checkpoint
    pipeline: Pipeline
    metrics: Metrics
    max_body_bytes: int
    max_upload_s: float
    clock: Callable[[], float] = time.monotonic


IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
SERVER_TIMING = {"description": "the times of timing_ms, in milliseconds", "schema": {"type": "string"}}
RETRY_AFTER = {"Retry-After": {"description": "seconds to wait before the next try", "schema": {"type": "integer"}}}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"headers": {"Server-Timing": SERVER_TIMING}},
    408: {"model": ErrorAnswer, "description": "the body did not arrive in time"},
    413: {"model": ErrorAnswer, "description": "the body or the image is too large"},
    415: {"model": ErrorAnswer, "description": "the content type is no image"},
    422: {"model": ErrorAnswer, "description": "a parameter, the budget or the image is unusable"},
    429: {"model": ErrorAnswer, "description": "too many requests are waiting", "headers": RETRY_AFTER},
    500: {"model": ErrorAnswer, "description": "the model failed"},
    503: {"model": ErrorAnswer, "description": "not ready yet, or stopping", "headers": RETRY_AFTER},
}


def build_router(api: Api) -> APIRouter:
    """Make the routes over `api`."""
    router = APIRouter()
    family = describe_family(api.checkpoint)

    @router.post(CLASSIFY_PATH, responses=RESPONSES, openapi_extra=IMAGE_BODY)
    async def classify(
        request: Request, response: Response, query: Annotated[ClassifyQuery, Query()]
    ) -> ClassifyAnswer:
        """Classify an image with the most accurate sub-network that fits the budget.

        The image comes as the multipart field `file`, or as the body itself.
        """
        arrived_at = api.clock()
        wanted = InferenceRequest(arrived_at, query.budget_gflops, query.subnetwork, query.top_k)
        answer = await _classify_while_connected(api, request, wanted)
        described = describe_answer(answer, api.checkpoint)
        stages = described.timing_ms.model_dump()
        response.headers["Server-Timing"] = ", ".join(f"{stage};dur={ms}" for stage, ms in stages.items())
        return described

    @router.get("/subnetworks")
    async def subnetworks() -> SubNetworksAnswer:
        """List every sub-network with its cost and measured accuracy."""
        return family

    @router.head("/health/live", include_in_schema=False)
    @router.get("/health/live")
    async def live() -> HealthAnswer:
        """Tell that the process answers."""
        return HealthAnswer(status="live")

    @router.head("/health/ready", include_in_schema=False)
    @router.get("/health/ready", responses={503: RESPONSES[503]})
    async def ready() -> HealthAnswer:
        """Tell whether the model has answered its first batch and requests are welcome."""
        if not api.pipeline.is_ready:
            raise NotReadyError("the model has not answered its first batch yet")
        return HealthAnswer(status="ready")

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Give all metrics in the Prometheus text format."""
        return Response(api.metrics.page(), media_type=CONTENT_TYPE)

    return router


async def _classify_while_connected(api: Api, request: Request, wanted: InferenceRequest) -> Classification:
    """Classify, and stop wherever the request stands once its client is gone: its compute is better spent elsewhere.

    Raises:
        ServiceError: the request is refused, or fails.
    """
    uploaded = asyncio.Event()

    async def read() -> bytes:
        data = await read_image(request, api.max_body_bytes, api.max_upload_s)
        uploaded.set()
        return data

    async def watch() -> None:
        await uploaded.wait()  # until then, reading the body notices it
        await wait_until_gone(request)

    answering = asyncio.create_task(api.pipeline.classify(read, wanted))
    watching = asyncio.create_task(watch())
    try:
        await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientGoneError("the client left before its answer")
        return answering.result()
    finally:
        answering.cancel()
        watching.cancel()


def add_error_handlers(app: FastAPI, api: Api) -> None:
    """Answer every error in one JSON shape, and count the requests that FastAPI refuses before the pipeline."""

    def may_be_long(request: Request) -> bool:
        length = request.headers.get("content-length", "0")
        return "transfer-encoding" in request.headers or int(length) > api.max_body_bytes

    @app.exception_handler(ServiceError)
    async def on_service_error(request: Request, error: ServiceError) -> Response:
        if isinstance(error, BodyTooLargeError):
            await _discard(request)
        response = _error(STATUS.get(type(error), 500), error.code, error.message, error.details)
        unread = isinstance(error, BodyTooLargeError | UploadTimeoutError) or may_be_long(request)
        return _closing(response) if unread else response

    @app.exception_handler(RequestValidationError)
    async def on_invalid_parameter(request: Request, error: RequestValidationError) -> Response:
        if request.url.path == CLASSIFY_PATH:
            api.metrics.request_refused(InvalidParameterError.code)
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"][1:])
        said = problem["msg"].removeprefix("Value error, ")  # pydantic's prefix to our own sentences
        message = f"{where}: {said}" if where else said
        response = _error(422, InvalidParameterError.code, message, {"parameter": where} if where else {})
        return _closing(response) if may_be_long(request) else response

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> Response:
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        return _error(error.status_code, code, error.detail, {}, error.headers)

    @app.exception_handler(Exception)
    async def on_bug(_: Request, __: Exception) -> Response:
        return _error(500, ServiceError.code, "the server failed; its log says why", {})


def _error(
    status: int, code: str, message: str, details: dict[str, Any], headers: Mapping[str, str] | None = None
) -> Response:
    headers = dict(headers or {})
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    body = ErrorAnswer(error=ErrorDetail(code=code, message=message, details=details))
    return JSONResponse(body.model_dump(), status, headers)


def _closing(response: Response) -> Response:
    """Close the connection after `response`, or the server would go on to read a body that it has refused."""
    response.headers["Connection"] = "close"
    return response


async def _discard(request: Request) -> None:
    """Throw away for a moment what the client still sends: most look for an answer only after they have sent it all."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            message = await request.receive()
            while message["type"] == "http.request" and message.get("more_body"):
                message = await request.receive()
