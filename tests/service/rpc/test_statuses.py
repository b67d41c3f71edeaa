import grpc

from service import errors
from service.errors import (
    ForeignOriginError,
    ModelChangeError,
    NoAnswerError,
    NotReadyError,
    OverloadedError,
    RequestError,
    ServiceError,
    UnknownHostError,
    UnknownRequestError,
)
from service.rpc.statuses import STATUS, describe_failure

OF_HTTP = {ForeignOriginError, UnknownHostError, UnknownRequestError}
ABSTRACT = {ServiceError, RequestError}


def test_every_error_that_a_call_can_raise_has_a_status() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServiceError)}
    of_clients = {kind for kind in kinds if issubclass(kind, NoAnswerError)}
    assert set(STATUS) == kinds - ABSTRACT - OF_HTTP - of_clients - {ModelChangeError}


def test_an_error_is_reported_with_its_status_message_and_code() -> None:
    failure = describe_failure(NotReadyError("not yet"))
    assert failure == (grpc.StatusCode.UNAVAILABLE, "not yet", (("error-code", "not_ready"),))


def test_an_overload_error_carries_grpcs_retry_pushback() -> None:
    failure = describe_failure(OverloadedError("too much", "backlog", 0.2505))
    assert failure.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ("grpc-retry-pushback-ms", "251") in failure.metadata


def test_an_error_without_a_specific_type_is_an_internal_error() -> None:
    assert describe_failure(ServiceError("oh")).status is grpc.StatusCode.INTERNAL
