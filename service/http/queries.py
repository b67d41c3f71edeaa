"""The parameters of a request, from its query, its form fields or its JSON, and their OpenAPI description."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from models.profiles import ProfileTable
from service.errors import InvalidParameterError
from service.request_parameters import ClassifyQuery, DecideQuery, validated

# Cached queries: most clients repeat theirs, and parsing one takes 6 % of the event loop's time for a request.
QUERIES_KEPT = 128

LIMITS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")

Schema = dict[str, Any]
Query = TypeVar("Query", bound=DecideQuery)


@lru_cache(QUERIES_KEPT)
def parse_query(query: bytes) -> ClassifyQuery:
    """Read the parameters of POST /classify from a query; errors as `parse_parameters`."""
    return parse_parameters(ClassifyQuery, query)


def parse_parameters(model: type[Query], query: bytes, further: Iterable[tuple[str, Any]] = ()) -> Query:
    """Read the parameters of a query and of the fields or members of a body; none may be in both.

    Raises:
        InvalidParameterError: a parameter is unusable, or given twice.
    """
    return validated(model, _once([*_pairs(query), *further]))


def read_query(query: bytes) -> dict[str, str]:
    """Return the parameters of a query by name.

    Raises:
        InvalidParameterError: a parameter is given twice.
    """
    return _once(_pairs(query))


def _pairs(query: bytes) -> list[tuple[str, str]]:
    return parse_qsl(query.decode("latin-1"), keep_blank_values=True)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise InvalidParameterError(f"{name}: must be given only once", parameter=name)
        values[name] = value
    return values


def describe_parameters(
    model: type[DecideQuery], profiles: ProfileTable, num_classes: int, highest_priority: int = 0
) -> dict[str, Schema]:
    """Describe parameters as OpenAPI schemas, with the values that a checkpoint allows.

    Args:
        model: the pydantic model of the query.
        profiles: the sub-networks that a request may ask for by name.
        num_classes: number of classes of the checkpoint.
        highest_priority: the highest priority that any request may have.

    Returns:
        The schema of each parameter by name.
    """
    known: dict[str, Schema] = {
        "budget_gflops": {"minimum": profiles.cheapest.gflops},
        "patch_grid": {"enum": sorted({profile.subnetwork.patch_grid for profile in profiles.rows})},
        "keep_rate": {"enum": sorted({profile.subnetwork.keep_rate for profile in profiles.rows})},
        "top_k": {"maximum": num_classes},
        "priority": {"maximum": highest_priority},
    }
    described = {}
    for name, field in model.model_json_schema()["properties"].items():
        value = field.get("anyOf", [field])[0]  # the other is null, which stands for an absent parameter
        bounds = known.get(name, {})
        described[name] = {"type": value["type"], "description": field["description"]}
        if field.get("default") is not None:
            described[name]["default"] = field["default"]
        described[name] |= bounds if "enum" in bounds else {key: value[key] for key in LIMITS if key in value} | bounds
    return described


def describe_query(schemas: Mapping[str, Schema]) -> list[Schema]:
    """Describe parameters as query parameters of an OpenAPI operation."""
    return [{"name": name, "in": "query", "required": False, **_apart(schema)} for name, schema in schemas.items()]


def describe_path(path: str) -> list[Schema]:
    """Describe the parameters in a path, for a route whose handler takes the whole request."""
    named = re.findall(r"{(\w+)}", path)
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in named]


def nullable(schema: Schema) -> Schema:
    """Describe a parameter that may also be null, which stands for an absent one."""
    apart = _apart(schema)
    return {"description": apart["description"], "anyOf": [apart["schema"], {"type": "null"}]}


def _apart(schema: Schema) -> Schema:
    rest = {key: value for key, value in schema.items() if key != "description"}
    return {"description": schema["description"], "schema": rest}
