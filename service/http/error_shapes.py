"""The JSON formats of errors: this server's own, and on routes that follow another server's API, that server's.

Its own is a problem of RFC 9457 with the additional member `error`.
"""

from typing import Any

from pydantic import BaseModel, Field

from service.errors import UnknownModelError
from service.http.schemas import ErrorAnswer

PROBLEM, JSON = "application/problem+json", "application/json"
V1_PREFIX, V2_PREFIX = "/v1", "/v2"
STATUSES = (401, 403, 404, 408, 413, 415, 421, 422, 429, 500, 503, 504)  # of errors on routes of other servers' APIs
TORCHSERVE_PREFIXES = ("/predictions/", "/ping")
TORCHSERVE_TYPES = {
    404: "ResourceNotFoundException",
    405: "MethodNotAllowedException",
    408: "RequestTimeoutException",
    429: "ServiceUnavailableException",
    503: "ServiceUnavailableException",
    504: "RequestTimeoutException",
}


class InferError(BaseModel):
    """An error in the format of the Open Inference Protocol and of TensorFlow Serving."""

    error: str = Field(description="human-readable message")


class TorchServeError(BaseModel):
    """An error in TorchServe's format."""

    code: int = Field(description="HTTP status")
    type: str
    message: str = Field(description="human-readable message")


def describe_failures(shape: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI error responses of a route that follows another server's API."""
    return {status: {"model": shape} for status in STATUSES}


def describe_problem(description: str, headers: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the OpenAPI description of an error response of this server's own routes."""
    # A `model` would get the media type of the route from FastAPI. ErrorAnswer is among the components in any case.
    content = {PROBLEM: {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
    return {"description": description, "content": content, "headers": headers or {}}


def shape_error(status: int, answer: ErrorAnswer, path: str, accept: str) -> tuple[bytes, str]:
    """Return the body of an error, in the format that clients of the path know, and its media type."""
    error = answer.error
    if path == V2_PREFIX or path.startswith((f"{V1_PREFIX}/", f"{V2_PREFIX}/")):
        return InferError(error=error.message).model_dump_json().encode(), JSON
    if path.startswith(TORCHSERVE_PREFIXES):
        kind = _torchserve_type(status, error.code)
        return TorchServeError(code=status, type=kind, message=error.message).model_dump_json().encode(), JSON
    return answer.model_dump_json().encode(), error_type(accept)


def error_type(accept: str) -> str:
    """Return the media type of an error: plain JSON for a client that accepts nothing else, with the same body."""
    return JSON if JSON in accept and PROBLEM not in accept and "*" not in accept else PROBLEM


def _torchserve_type(status: int, code: str) -> str:
    if code == UnknownModelError.code:
        return "ModelNotFoundException"
    return TORCHSERVE_TYPES.get(status, "BadRequestException" if status < 500 else "InternalServerException")
