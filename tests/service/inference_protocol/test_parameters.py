from typing import Any

import pytest

from service.errors import InvalidParameterError
from service.inference_protocol.messages import Parameters
from service.inference_protocol.parameters import parameters_of

HEADERS = {"x-budget-gflops": "1", "x-budget-ms": "100", "x-min-confidence": "0.1", "x-priority": "-1"}


def test_the_body_overrides_the_query_and_the_query_overrides_the_headers() -> None:
    only_headers = parameters_of({}, {}, HEADERS)
    assert only_headers.budget_gflops == 1
    assert (only_headers.budget_ms, only_headers.min_confidence, only_headers.priority) == (100, 0.1, -1)
    query = {"budget_gflops": "2", "budget_ms": "200"}
    assert parameters_of({}, query, HEADERS).budget_gflops == 2
    mixed = parameters_of({"budget_gflops": 3}, query, HEADERS)
    assert (mixed.budget_gflops, mixed.budget_ms, mixed.min_confidence) == (3, 200, 0.1)


def test_every_parameter_of_a_classification_may_be_in_the_body() -> None:
    given = parameters_of({"patch_grid": 8, "keep_rate": 0.5, "top_k": 3}, {}, {})
    assert given.subnetwork is not None
    assert (given.subnetwork.patch_grid, given.subnetwork.keep_rate, given.top_k) == (8, 0.5, 3)


@pytest.mark.parametrize(
    ("tritons", "ours"), [(0, 0), (1, 0), (2, -1), (5, -4), (11, -10), (12, -10), (2**63, -10), (-3, -3), ("2", -1)]
)
def test_triton_priorities_in_the_body_are_translated_to_our_levels(tritons: int | str, ours: int) -> None:
    assert parameters_of({"priority": tritons}, {}, {}).priority == ours


@pytest.mark.parametrize("priority", [5, 1, 0, -3])
def test_priorities_in_the_query_and_the_headers_are_not_translated(priority: int) -> None:
    assert parameters_of({}, {"priority": str(priority)}, {}).priority == priority
    assert parameters_of({}, {}, {"x-priority": str(priority)}).priority == priority
    assert parameters_of({"priority": 2}, {"priority": str(priority)}, {}).priority == -1


@pytest.mark.parametrize(
    ("body", "budget_ms"),
    [
        ({"timeout": 250_000}, 250),
        ({"timeout": 0}, None),
        ({"timeout": 0, "budget_ms": 70}, 70),
        ({"timeout": 50_000, "budget_ms": 70}, 50),
        ({"timeout": 90_000, "budget_ms": 70}, 70),
    ],
)
def test_the_shorter_of_timeout_in_microseconds_and_budget_ms_counts(
    body: dict[str, int], budget_ms: float | None
) -> None:
    assert parameters_of(body, {}, {}).budget_ms == budget_ms


@pytest.mark.parametrize(
    ("body", "parameter"),
    [
        ({"budget": 1}, "budget"),
        ({"budget_ms": True}, "budget_ms"),
        ({"budget_ms": "soon"}, "budget_ms"),
        ({"budget_ms": -1}, "budget_ms"),
        ({"priority": "high"}, "priority"),
        ({"priority": -11}, "priority"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": "1 s"}, "timeout"),
        ({"timeout": 0.5}, "timeout"),
        ({"sequence_id": 7}, "sequence_id"),
        ({"sequence_start": True}, "sequence_start"),
        ({"top_k": [1]}, "top_k"),
    ],
)
def test_unknown_and_invalid_parameters_are_named(body: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        parameters_of(body, {}, {})
    assert caught.value.details["parameter"] == parameter


def test_parameters_that_only_other_servers_use_are_ignored() -> None:
    harmless: Parameters = {
        "binary_data_output": True,
        "sequence_id": 0,
        "sequence_end": False,
        "content_type": "base64",
    }
    assert parameters_of(harmless, {}, {}) == parameters_of({}, {}, {})
