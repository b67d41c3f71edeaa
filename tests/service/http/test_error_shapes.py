import json

import pytest

from service.errors import InvalidParameterError, UnknownModelError
from service.http.error_shapes import JSON, PROBLEM, shape_error
from service.http.schemas import ErrorAnswer, ErrorDetail


def shaped(path: str, status: int = 422, code: str = InvalidParameterError.code) -> object:
    body, media_type = shape_error(status, problem(status, code), path, "")
    assert media_type == JSON
    return json.loads(body)


def problem(status: int, code: str) -> ErrorAnswer:
    detail = ErrorDetail(code=code, message="a sentence", details={"parameter": "x"})
    return ErrorAnswer(type=f"urn:{code}", title=code, status=status, detail="a sentence", error=detail)


@pytest.mark.parametrize("path", ["/v2", "/v2/models/tiny/infer", "/v1/models/tiny:predict"])
def test_errors_on_the_routes_of_triton_and_tensorflow_serving_hold_only_a_message(path: str) -> None:
    assert shaped(path) == {"error": "a sentence"}


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (422, "invalid_parameter", "BadRequestException"),
        (404, "not_found", "ResourceNotFoundException"),
        (404, UnknownModelError.code, "ModelNotFoundException"),
        (405, "method_not_allowed", "MethodNotAllowedException"),
        (429, "overloaded", "ServiceUnavailableException"),
        (503, "not_ready", "ServiceUnavailableException"),
        (504, "deadline_exceeded", "RequestTimeoutException"),
        (500, "model_error", "InternalServerException"),
    ],
)
def test_errors_on_the_routes_of_torchserve_have_the_type_that_torchserve_gives_them(
    status: int, code: str, kind: str
) -> None:
    assert shaped("/predictions/tiny", status, code) == {"code": status, "type": kind, "message": "a sentence"}


@pytest.mark.parametrize("path", ["/classify", "/v2x", "/", "/v20/models"])
def test_errors_on_all_other_routes_are_problems_with_a_code_and_details(path: str) -> None:
    answer = problem(422, "invalid_parameter")
    assert shape_error(422, answer, path, "*/*") == (answer.model_dump_json().encode(), PROBLEM)


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("", PROBLEM),
        ("application/json", JSON),
        ("application/json, */*", PROBLEM),
        (f"application/json, {PROBLEM}", PROBLEM),
        ("text/html", PROBLEM),
    ],
)
def test_errors_are_typed_plain_json_only_for_clients_that_accept_nothing_but_json(
    accept: str, media_type: str
) -> None:
    assert shape_error(422, problem(422, "invalid_parameter"), "/classify", accept)[1] == media_type
