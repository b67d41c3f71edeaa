"""The HTTP routes: requests in, answers out, and the one table from error type to status."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from models.checkpoint import Checkpoint
from service.domain import InferenceRequest
from service.errors import (
    BodyTooLargeError,
    BudgetTooSmallError,
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
from service.uploads import read_image

STATUS = {
    InvalidParameterError: 422,
    BudgetTooSmallError: 422,
    InvalidImageError: 422,
    ImageTooLargeError: 413,
    BodyTooLargeError: 413,
    UploadTimeoutError: 408,
    UnsupportedMediaError: 415,
    OverloadedError: 429,
    NotReadyError: 503,
    ModelError: 500,
}
CLASSIFY_PATH = "/classify"
CLIENT_CLOSED_REQUEST = 499
RETRY_AFTER_S = 1


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
        },
    }
}
ERRORS: dict[int | str, dict[str, Any]] = {
    408: {"model": ErrorAnswer, "description": "the body did not arrive in time"},
    413: {"model": ErrorAnswer, "description": "the body or the image is too large"},
    415: {"model": ErrorAnswer, "description": "the content type is no image"},
    422: {"model": ErrorAnswer, "description": "a parameter, the budget or the image is unusable"},
    429: {"model": ErrorAnswer, "description": "too many requests are waiting"},
    500: {"model": ErrorAnswer, "description": "the model failed"},
    503: {"model": ErrorAnswer, "description": "not ready yet, or stopping"},
}


def build_router(api: Api) -> APIRouter:
    """Make the routes over `api`."""
    router = APIRouter()
    family = describe_family(api.checkpoint)

    @router.post(CLASSIFY_PATH, responses=ERRORS, openapi_extra=IMAGE_BODY)
    async def classify(
        request: Request, response: Response, query: Annotated[ClassifyQuery, Query()]
    ) -> ClassifyAnswer:
        """Classify an image with the most accurate sub-network that fits the budget.

        The image comes as the multipart field `file`, or as the body itself.
        """
        arrived_at = api.clock()
        wanted = InferenceRequest(arrived_at, query.budget_gflops, query.subnetwork, query.top_k)
        answer = await api.pipeline.classify(lambda: read_image(request, api.max_body_bytes, api.max_upload_s), wanted)
        described = describe_answer(answer, api.checkpoint)
        stages = described.timing_ms.model_dump()
        response.headers["Server-Timing"] = ", ".join(f"{stage};dur={ms}" for stage, ms in stages.items())
        return described

    @router.get("/subnetworks")
    async def subnetworks() -> SubNetworksAnswer:
        """List every sub-network with its cost and measured accuracy."""
        return family

    @router.get("/health/live")
    async def live() -> HealthAnswer:
        """Tell that the process answers."""
        return HealthAnswer(status="live")

    @router.get("/health/ready", responses={503: ERRORS[503]})
    async def ready() -> HealthAnswer:
        """Tell whether the model has answered its first batch and requests are welcome."""
        if not api.pipeline.is_ready:
            raise NotReadyError("the model has not answered its first batch yet")
        return HealthAnswer(status="ready")

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Give all metrics in the Prometheus text format."""
        return Response(api.metrics.page(), media_type=CONTENT_TYPE)

    return router


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Answer every error in one JSON shape, and count the requests that FastAPI refuses before the pipeline."""

    @app.exception_handler(ServiceError)
    async def on_service_error(_: Request, error: ServiceError) -> Response:
        return _error(STATUS.get(type(error), 500), error.code, error.message, error.details)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_parameter(request: Request, error: RequestValidationError) -> Response:
        if request.url.path == CLASSIFY_PATH:
            metrics.request_refused(InvalidParameterError.code)
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"][1:])
        said = problem["msg"].removeprefix("Value error, ")  # pydantic's prefix to our own sentences
        message = f"{where}: {said}" if where else said
        return _error(422, InvalidParameterError.code, message, {"parameter": where} if where else {})

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> Response:
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        return _error(error.status_code, code, error.detail, {}, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)
    async def on_bug(_: Request, __: Exception) -> Response:
        return _error(500, ServiceError.code, "the server failed; its log says why", {})


def _error(
    status: int, code: str, message: str, details: dict[str, Any], headers: Mapping[str, str] | None = None
) -> Response:
    headers = dict(headers or {})
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if status in (408, 413):
        headers["Connection"] = "close"  # or the server would go on to read what it has just refused
    body = ErrorAnswer(error=ErrorDetail(code=code, message=message, details=details))
    return JSONResponse(body.model_dump(), status, headers)
