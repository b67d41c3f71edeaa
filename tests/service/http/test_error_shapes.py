import json

import pytest

from service.errors import InvalidParameterError, UnknownModelError
from service.http.error_shapes import shape_error
from service.http.schemas import ErrorAnswer, ErrorDetail


def shaped(path: str, status: int = 422, code: str = InvalidParameterError.code) -> object:
    answer = ErrorAnswer(error=ErrorDetail(code=code, message="a sentence", details={"parameter": "x"}))
    return json.loads(shape_error(status, answer, path))


@pytest.mark.parametrize("path", ["/v2", "/v2/models/tiny/infer", "/v1/models/tiny:predict"])
def test_on_the_routes_of_triton_and_tensorflow_serving_an_error_is_a_sentence(path: str) -> None:
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
def test_on_those_of_torchserve_it_has_the_type_that_torchserve_gives_it(status: int, code: str, kind: str) -> None:
    assert shaped("/predictions/tiny", status, code) == {"code": status, "type": kind, "message": "a sentence"}


@pytest.mark.parametrize("path", ["/classify", "/v2x", "/", "/v20/models"])
def test_everywhere_else_it_has_a_code_and_details_too(path: str) -> None:
    detail = {"code": "invalid_parameter", "message": "a sentence", "details": {"parameter": "x"}}
    assert shaped(path) == {"error": detail}
