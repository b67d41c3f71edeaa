"""Error responses: the table from error type to HTTP status, and when to close the connection."""

import asyncio
import contextlib
import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount

from service.errors import (
    BodyTooLargeError,
    BudgetTooSmallError,
    ClientGoneError,
    DeadlineError,
    ForeignOriginError,
    ImageTooLargeError,
    InvalidImageError,
    InvalidParameterError,
    InvalidTensorError,
    ModelChangeError,
    ModelError,
    NotReadyError,
    OutOfMemoryError,
    OverloadedError,
    ServiceError,
    UnauthorizedError,
    UnknownHostError,
    UnknownModelError,
    UnknownRequestError,
    UnsupportedMediaError,
    UploadTimeoutError,
    invalid_parameter,
)
from service.http.error_shapes import shape_error
from service.http.request_ids import HEADER, KEY
from service.http.schemas import ErrorAnswer, ErrorDetail
from service.telemetry.reports import note_error

logger = logging.getLogger(__name__)

STATUS = {
    InvalidParameterError: 422,
    InvalidTensorError: 422,
    UnknownModelError: 404,
    UnknownRequestError: 404,
    BudgetTooSmallError: 422,
    InvalidImageError: 422,
    ImageTooLargeError: 413,
    BodyTooLargeError: 413,
    UploadTimeoutError: 408,
    ClientGoneError: 499,  # for the access log; the client has gone
    UnsupportedMediaError: 415,
    UnauthorizedError: 401,
    ForeignOriginError: 403,
    UnknownHostError: 421,
    OverloadedError: 429,
    NotReadyError: 503,
    OutOfMemoryError: 503,
    DeadlineError: 504,
    ModelChangeError: 409,
    ModelError: 500,
}
RETRY_AFTER_S = 1
LINGER_S = 1
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
TYPE_PREFIX = "urn:supervit:error:"  # followed by the code: an identifier for programs, not a URL


class ErrorAnswers:
    """Answers every error of the application."""

    def __init__(self, max_body_bytes: int) -> None:
        """Set the longest body: once an error is sent, a body that may be longer is not read to its end."""
        self._max_body_bytes = max_body_bytes

    def add_to(self, app: FastAPI) -> None:
        """Register the handlers for the errors of all routes of an app."""
        app.exception_handler(ServiceError)(self.on_service_error)
        app.exception_handler(RequestValidationError)(self._on_invalid_parameter)
        app.exception_handler(HTTPException)(self._on_http_error)
        app.exception_handler(Exception)(_on_bug)

    async def on_service_error(self, request: Request, error: ServiceError) -> Response:
        """Answer a request that fails."""
        if isinstance(error, BodyTooLargeError):
            return await refuse(request, error)
        response = _respond(request, error)
        return _closing(response) if isinstance(error, UploadTimeoutError) or self._may_be_long(request) else response

    async def _on_invalid_parameter(self, request: Request, error: RequestValidationError) -> Response:
        # FastAPI puts the kind of the parameter, such as the query, before its name.
        problems = [{**problem, "loc": problem["loc"][1:]} for problem in error.errors()]
        return await self.on_service_error(request, invalid_parameter(problems))

    async def _on_http_error(self, request: Request, error: HTTPException) -> Response:
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        message, headers = error.detail, error.headers
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = ", ".join(_methods_of(request))
            headers = {**(headers or {}), "Allow": allowed}
            message = f"{request.url.path} accepts {allowed}, not {request.method}"
        note_error(code)
        described, path = _described(error.status_code, code, message), request.scope["path"]
        accept = request.headers.get("accept", "")
        response = make_error_response(error.status_code, described, headers, path=path, accept=accept)
        return _closing(response) if self._may_be_long(request) else response

    def _may_be_long(self, request: Request) -> bool:
        if "transfer-encoding" in request.headers or _expects_continue(request):
            return True
        return int(request.headers.get("content-length", "0")) > self._max_body_bytes


def _methods_of(request: Request) -> list[str]:
    """Return the methods of all routes at the request's path; Starlette names those of the first route alone."""
    scopes = {method: {**request.scope, "method": method} for method in METHODS}
    routes = request.app.routes
    if any(isinstance(route, Mount) and request.scope.get("root_path", "").endswith(route.path) for route in routes):
        return ["GET", "HEAD"]  # of static files
    return [method for method in METHODS if any(route.matches(scopes[method])[0] is Match.FULL for route in routes)]


async def refuse(request: Request, error: ServiceError) -> Response:
    """Answer a request whose body is not wanted with an error, and close the connection."""
    if not _expects_continue(request):
        await _discard(request)
    return _closing(_respond(request, error))


def describe_error(error: ServiceError) -> tuple[int, ErrorAnswer]:
    """Return the status and the body of an error. One with status 500 is logged, and the log names its request."""
    status = STATUS.get(type(error), 500)
    note_error(error.code)
    if status == 500:
        logger.error("%s", error.message)
    return status, _described(status, error.code, error.message, error.details)


def make_error_response(
    status: int, answer: ErrorAnswer, headers: Mapping[str, str] | None = None, *, path: str = "", accept: str = ""
) -> Response:
    """Create the response for an error, in the format that clients of the path know.

    Args:
        status: HTTP status.
        answer: content of the error.
        headers: headers in addition to those of every error.
        path: path of the request.
        accept: the request's Accept header.
    """
    headers = dict(headers or {})
    if status in (429, 503):
        retry_after_s = math.ceil(answer.error.details.get("retry_after_s", 0))
        headers["Retry-After"] = str(max(RETRY_AFTER_S, retry_after_s))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body, media_type = shape_error(status, answer, path, accept)
    return Response(body, status, headers, media_type)


async def _on_bug(request: Request, error: Exception) -> Response:
    logger.error("%r", error)  # uvicorn logs the traceback
    headers = {HEADER: request.scope[KEY]} if KEY in request.scope else {}  # this answer bypasses RequestIds
    described = _described(500, ServiceError.code, "internal server error; see the server's log")
    path, accept = request.scope["path"], request.headers.get("accept", "")
    return make_error_response(500, described, headers, path=path, accept=accept)


def _respond(request: Request, error: ServiceError) -> Response:
    accept = request.headers.get("accept", "")
    return make_error_response(*describe_error(error), path=request.scope["path"], accept=accept)


def _described(status: int, code: str, message: str, details: dict[str, Any] | None = None) -> ErrorAnswer:
    return ErrorAnswer(
        type=f"{TYPE_PREFIX}{code}",
        title=code.replace("_", " ").capitalize(),
        status=status,
        detail=message,
        error=ErrorDetail(code=code, message=message, details=details or {}),
    )


def _expects_continue(request: Request) -> bool:
    """Return whether the client sends its body only after a 100 Continue, which a refused request must not get."""
    return "expect" in request.headers


def _closing(response: Response) -> Response:
    """Close the connection after `response`, or the server would continue to read a body that it has refused."""
    response.headers["Connection"] = "close"
    return response


async def _discard(request: Request) -> None:
    """Discard what the client still sends, for at most LINGER_S: most read the answer only after sending everything."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            message = await request.receive()
            while message["type"] == "http.request" and message.get("more_body"):
                message = await request.receive()
