import grpc

from service.errors import (
    ForeignOriginError,
    ModelChangeError,
    NotReadyError,
    OverloadedError,
    RequestError,
    ServiceError,
    UnknownHostError,
)
from service.rpc.statuses import STATUS, describe_failure

OF_BROWSERS = {ForeignOriginError, UnknownHostError}


def kinds_of(error: type[ServiceError]) -> set[type[ServiceError]]:
    below = error.__subclasses__()
    return {error}.union(*map(kinds_of, below)) if below else {error}


def test_every_error_that_a_call_can_meet_has_a_status() -> None:
    assert set(STATUS) == kinds_of(ServiceError) - {ServiceError, RequestError} - OF_BROWSERS - {ModelChangeError}


def test_an_error_is_told_with_its_code_and_without_its_details() -> None:
    failure = describe_failure(NotReadyError("not yet"))
    assert failure == (grpc.StatusCode.UNAVAILABLE, "not yet", (("error-code", "not_ready"),))


def test_overload_says_in_grpcs_own_words_when_to_try_again() -> None:
    failure = describe_failure(OverloadedError("too much", "backlog", 0.2505))
    assert failure.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ("grpc-retry-pushback-ms", "251") in failure.metadata


def test_an_error_without_a_kind_is_the_servers_own() -> None:
    assert describe_failure(ServiceError("oh")).status is grpc.StatusCode.INTERNAL
