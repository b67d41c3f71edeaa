"""What a request asks for, by one rule: its body goes before the query, and that before headers or metadata."""

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
# What clients of other servers say of how they want their answer, or to servers of theirs; nothing here depends on it.
OF_OTHERS = frozenset(("binary_data_output", "content_type", "headers", "triton_enable_empty_final_response"))
OF_SEQUENCES = ("sequence_id", "sequence_start", "sequence_end")


def parameters_of(body: Parameters, query: Mapping[str, str], headers: Mapping[str, str]) -> ClassifyQuery:
    """Read the parameters of a request.

    Args:
        body: its own `parameters`, with Triton's `priority`, and its `timeout` in microseconds, of which and
            `budget_ms` the shorter counts.
        query: of its URL.
        headers: its headers or its metadata, by names in lower case.

    Raises:
        InvalidParameterError: one is unusable, or there is none of that name.
    """
    named = {name: headers[header] for header, name in HEADERS.items() if header in headers}
    values: dict[str, Any] = {**named, **query}
    for name, value in body.items():
        if name in OF_SEQUENCES:
            _refuse_sequences(name, value)
        elif name not in OF_OTHERS:
            number = _number(name, value)
            values[name] = _own_priority(number) if name == "priority" else number
    timeout_us = values.pop("timeout", None)
    parameters = validated(ClassifyQuery, values)
    return parameters if timeout_us is None else _bounded(parameters, timeout_us)


def _number(name: str, value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InvalidParameterError(f"{name}: a number is wanted", parameter=name)
    return value


def _refuse_sequences(name: str, value: object) -> None:
    if value:
        raise InvalidParameterError(f"{name}: sequences of requests are not supported", parameter=name)


def _own_priority(value: object) -> object:
    """Translate Triton's levels, of which 1 is the highest and 0 the default, to ours; those below 0 are ours."""
    try:
        level = int(str(value))
    except ValueError:
        return value  # to be told so with the others
    return level if level <= 0 else max(1 - level, LOWEST_PRIORITY)


def _bounded(parameters: ClassifyQuery, timeout_us: Any) -> ClassifyQuery:  # noqa: ANN401 - as it came
    """Let the shorter of two times count; a timeout of 0 is none, as in Triton."""
    try:
        budget_ms = int(str(timeout_us)) / 1000
    except (ValueError, OverflowError):
        budget_ms = -1.0
    if budget_ms < 0:
        raise InvalidParameterError("timeout: a whole number of microseconds is wanted", parameter="timeout")
    if budget_ms == 0 or (parameters.budget_ms is not None and parameters.budget_ms <= budget_ms):
        return parameters
    return parameters.model_copy(update={"budget_ms": budget_ms})
