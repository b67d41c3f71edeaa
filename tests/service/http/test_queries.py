import pytest

from service.errors import InvalidParameterError
from service.http.queries import parse_parameters, parse_query
from service.request_parameters import ClassifyQuery


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (b"x=1", "x: unknown parameter"),
        (b"budget_ms=soon", "budget_ms: must be a number"),
        (b"budget_ms=nan", "budget_ms: must be a finite number"),
        (b"budget_gflops=0", "budget_gflops: must be greater than 0"),
        (b"priority=11", "priority: must be at most 10"),
        (b"priority=-11", "priority: must be at least -10"),
        (b"top_k=1.5", "top_k: must be an integer"),
        (b"top_k=" + 5000 * b"9", "top_k: has too many digits"),
        (b"keep_rate=1.01&patch_grid=14", "keep_rate: must be at most 1"),
        (b"keep_rate=0.5", "patch_grid and keep_rate go together: give both or none"),
        (b"top_k=1&top_k=1", "top_k: must be given only once"),
    ],
)
def test_an_invalid_query_parameter_gets_a_message_of_our_own(query: bytes, message: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        parse_query(query)
    assert caught.value.message == message


def test_parameters_next_to_an_image_in_a_body_are_read_like_those_of_the_query() -> None:
    assert parse_parameters(ClassifyQuery, b"top_k=2", [("budget_ms", "7")]) == parse_query(b"budget_ms=7&top_k=2")
    assert parse_parameters(ClassifyQuery, b"", [("budget_ms", 7.5)]).budget_ms == 7.5  # from JSON
    with pytest.raises(InvalidParameterError, match="budget_ms: must be given only once"):
        parse_parameters(ClassifyQuery, b"budget_ms=7", [("budget_ms", "7")])
