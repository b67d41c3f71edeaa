"""The JSON shapes of errors: ours, and on the routes of other servers the ones that their clients know.

Ours is a problem of RFC 9457 with one member more, `error`.
"""

from typing import Any

from pydantic import BaseModel, Field

from service.errors import UnknownModelError
from service.http.schemas import ErrorAnswer

PROBLEM, JSON = "application/problem+json", "application/json"
V1_PREFIX, V2_PREFIX = "/v1", "/v2"
STATUSES = (401, 403, 404, 408, 413, 415, 421, 422, 429, 500, 503, 504)  # of requests to other servers' routes
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
    """An error as the Open Inference Protocol has it, and TensorFlow Serving."""

    error: str = Field(description="a sentence for a person")


class TorchServeError(BaseModel):
    """An error as TorchServe has it."""

    code: int = Field(description="the status")
    type: str
    message: str = Field(description="a sentence for a person")


def describe_failures(shape: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Describe how a request to a route of another server may fail, in OpenAPI's words."""
    return {status: {"model": shape} for status in STATUSES}


def shape_error(status: int, answer: ErrorAnswer, path: str, accept: str) -> tuple[bytes, str]:
    """Make the body of an error for a request to a path, and name its media type."""
    error = answer.error
    if path == V2_PREFIX or path.startswith((f"{V1_PREFIX}/", f"{V2_PREFIX}/")):
        return InferError(error=error.message).model_dump_json().encode(), JSON
    if path.startswith(TORCHSERVE_PREFIXES):
        kind = _torchserve_type(status, error.code)
        return TorchServeError(code=status, type=kind, message=error.message).model_dump_json().encode(), JSON
    return answer.model_dump_json().encode(), error_type(accept)


def error_type(accept: str) -> str:
    """Choose the media type of an error; to a client that takes plain JSON alone, the same body is that."""
    return JSON if JSON in accept and PROBLEM not in accept and "*" not in accept else PROBLEM


def _torchserve_type(status: int, code: str) -> str:
    if code == UnknownModelError.code:
        return "ModelNotFoundException"
    return TORCHSERVE_TYPES.get(status, "BadRequestException" if status < 500 else "InternalServerException")
