"""Errors in gRPC: the only table from error type to status code, and what the client of a failed call gets."""

import math
from typing import NamedTuple

import grpc

from service.errors import (
    BodyTooLargeError,
    BudgetTooSmallError,
    ClientGoneError,
    DeadlineError,
    ImageTooLargeError,
    InvalidImageError,
    InvalidParameterError,
    InvalidTensorError,
    ModelError,
    NotReadyError,
    OutOfMemoryError,
    OverloadedError,
    ServiceError,
    UnauthorizedError,
    UnknownModelError,
    UnsupportedMediaError,
    UploadTimeoutError,
)

STATUS = {
    InvalidParameterError: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidTensorError: grpc.StatusCode.INVALID_ARGUMENT,
    BudgetTooSmallError: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidImageError: grpc.StatusCode.INVALID_ARGUMENT,
    ImageTooLargeError: grpc.StatusCode.INVALID_ARGUMENT,
    BodyTooLargeError: grpc.StatusCode.INVALID_ARGUMENT,
    UnsupportedMediaError: grpc.StatusCode.INVALID_ARGUMENT,
    UnauthorizedError: grpc.StatusCode.UNAUTHENTICATED,
    UnknownModelError: grpc.StatusCode.NOT_FOUND,
    ClientGoneError: grpc.StatusCode.CANCELLED,
    UploadTimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotReadyError: grpc.StatusCode.UNAVAILABLE,
    OutOfMemoryError: grpc.StatusCode.UNAVAILABLE,
    ModelError: grpc.StatusCode.INTERNAL,
}
CODE = "error-code"
PUSHBACK = "grpc-retry-pushback-ms"  # honoured by clients that retry, see gRFC A6


class Failure(NamedTuple):
    """How a failed call ends."""

    status: grpc.StatusCode
    message: str
    metadata: tuple[tuple[str, str], ...]


def describe_failure(error: ServiceError) -> Failure:
    """Return the status of an error, its message, and trailing metadata for programs."""
    metadata = [(CODE, error.code)]
    if "retry_after_s" in error.details:
        metadata.append((PUSHBACK, str(math.ceil(1000 * error.details["retry_after_s"]))))
    return Failure(STATUS.get(type(error), grpc.StatusCode.INTERNAL), error.message, tuple(metadata))


BUG = Failure(grpc.StatusCode.INTERNAL, "internal server error; see the server's log", ((CODE, ServiceError.code),))
