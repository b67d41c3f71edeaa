"""The parameters of a request, in its query, in the fields of its form or in its JSON, and described for OpenAPI."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from models.profiles import ProfileTable
from service.errors import InvalidParameterError
from service.request_parameters import ClassifyQuery, DecideQuery, validated

# Most clients ask the same again and again, and to parse it takes 6 % of the loop's time for a request.
QUERIES_KEPT = 128

LIMITS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")

Schema = dict[str, Any]


@lru_cache(QUERIES_KEPT)
def parse_query(query: bytes) -> ClassifyQuery:
    """Read the parameters of POST /classify from a query.

    Raises:
        InvalidParameterError: one is unusable, or given twice.
    """
    return validated(ClassifyQuery, _once(_pairs(query)))


def parse_decide_query(query: bytes) -> DecideQuery:
    """Read the parameters of POST /decide; errors as `parse_query`."""
    return validated(DecideQuery, _once(_pairs(query)))


def parse_parameters(query: bytes, beside: Iterable[tuple[str, Any]]) -> ClassifyQuery:
    """Read the parameters of a query and of what is beside the image; none may be in both.

    Raises:
        InvalidParameterError: one is unusable, or given twice.
    """
    return validated(ClassifyQuery, _once([*_pairs(query), *beside]))


def read_query(query: bytes) -> dict[str, str]:
    """Read a query by the names of its parameters.

    Raises:
        InvalidParameterError: one is given twice.
    """
    return _once(_pairs(query))


def _pairs(query: bytes) -> list[tuple[str, str]]:
    return parse_qsl(query.decode("latin-1"), keep_blank_values=True)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise InvalidParameterError(f"{name}: it is given twice", parameter=name)
        values[name] = value
    return values


def describe_parameters(model: type[DecideQuery], profiles: ProfileTable, num_classes: int) -> dict[str, Schema]:
    """Describe parameters in OpenAPI's words, with the values that they may have for a checkpoint.

    Args:
        model: of the query.
        profiles: every sub-network that can be had by name.
        num_classes: of the checkpoint.

    Returns:
        The schema of each parameter by its name.
    """
    known: dict[str, Schema] = {
        "budget_gflops": {"minimum": profiles.cheapest.gflops},
        "patch_grid": {"enum": sorted({profile.subnetwork.patch_grid for profile in profiles.rows})},
        "keep_rate": {"enum": sorted({profile.subnetwork.keep_rate for profile in profiles.rows})},
        "top_k": {"maximum": num_classes},
    }
    described = {}
    for name, field in model.model_json_schema()["properties"].items():
        value = field.get("anyOf", [field])[0]  # the other is null, which means that it is left out
        bounds = known.get(name, {})
        described[name] = {"type": value["type"], "description": field["description"]}
        if field.get("default") is not None:
            described[name]["default"] = field["default"]
        described[name] |= bounds if "enum" in bounds else {key: value[key] for key in LIMITS if key in value} | bounds
    return described


def describe_query(schemas: Mapping[str, Schema]) -> list[Schema]:
    """Describe parameters as those of an OpenAPI operation's query."""
    return [{"name": name, "in": "query", "required": False, **_apart(schema)} for name, schema in schemas.items()]


def nullable(schema: Schema) -> Schema:
    """Describe a parameter that may also be null, which means that it is left out."""
    apart = _apart(schema)
    return {"description": apart["description"], "anyOf": [apart["schema"], {"type": "null"}]}


def _apart(schema: Schema) -> Schema:
    rest = {key: value for key, value in schema.items() if key != "description"}
    return {"description": schema["description"], "schema": rest}
