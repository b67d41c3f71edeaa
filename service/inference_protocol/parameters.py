"""Reads the parameters of a request: the body takes precedence over the query, and that over headers or metadata."""

from collections.abc import Mapping
from typing import Any

from service.domain import LOWEST_PRIORITY
from service.errors import InvalidParameterError
from service.inference_protocol.messages import Parameters
from service.request_parameters import ClassifyQuery, validated

HEADERS = {
    "x-budget-gflops": "budget_gflops",
    "x-budget-ms": "budget_ms",
    "x-min-confidence": "min_confidence",
    "x-priority": "priority",
}
# Parameters of other servers' clients, for the form of the answer or for those servers; nothing here depends on them.
IGNORED_PARAMETERS = frozenset(("binary_data_output", "content_type", "headers", "triton_enable_empty_final_response"))
SEQUENCE_PARAMETERS = ("sequence_id", "sequence_start", "sequence_end")


def parameters_of(body: Parameters, query: Mapping[str, str], headers: Mapping[str, str]) -> ClassifyQuery:
    """Read the parameters of a request.

    Args:
        body: `parameters` of the body, with Triton's `priority` and its `timeout` in microseconds; the shorter of
            `timeout` and `budget_ms` counts.
        query: query parameters of the URL.
        headers: headers or metadata, by names in lower case.

    Raises:
        InvalidParameterError: a parameter is unusable, or there is none of its name.
    """
    named = {name: headers[header] for header, name in HEADERS.items() if header in headers}
    values: dict[str, Any] = {**named, **query}
    for name, value in body.items():
        if name in SEQUENCE_PARAMETERS:
            _refuse_sequences(name, value)
        elif name not in IGNORED_PARAMETERS:
            number = _number(name, value)
            values[name] = _own_priority(number) if name == "priority" else number
    timeout_us = values.pop("timeout", None)
    parameters = validated(ClassifyQuery, values)
    return parameters if timeout_us is None else _bounded(parameters, timeout_us)


def _number(name: str, value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InvalidParameterError(f"{name}: must be a number", parameter=name)
    return value


def _refuse_sequences(name: str, value: object) -> None:
    if value:
        raise InvalidParameterError(f"{name}: sequences of requests are not supported", parameter=name)


def _own_priority(value: object) -> object:
    """Translate Triton's levels (1 is the highest, 0 the default) to ours; levels below 0 are ours already."""
    try:
        level = int(str(value))
    except ValueError:
        return value  # reported by the validation of all parameters
    return level if level <= 0 else max(1 - level, LOWEST_PRIORITY)


def _bounded(parameters: ClassifyQuery, timeout_us: Any) -> ClassifyQuery:  # noqa: ANN401 - as it came
    """Shorten the latency budget to the timeout; a timeout of 0 is none, as in Triton."""
    try:
        budget_ms = int(str(timeout_us)) / 1000
    except (ValueError, OverflowError):
        budget_ms = -1.0
    if budget_ms < 0:
        raise InvalidParameterError("timeout: must be an integer, in microseconds", parameter="timeout")
    if budget_ms == 0 or (parameters.budget_ms is not None and parameters.budget_ms <= budget_ms):
        return parameters
    return parameters.model_copy(update={"budget_ms": budget_ms})
