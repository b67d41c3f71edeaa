"""What a request says beside its image, in its query, in the fields of its form or in its JSON, as pydantic models."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.profiles import ProfileTable
from models.subnetwork import SubNetwork
from service.access.key_file import HIGHEST_PRIORITY, LOWEST_PRIORITY
from service.domain import DEFAULT_TOP_K, ApiKey, InferenceRequest
from service.errors import InvalidParameterError, invalid_parameter

# Most clients ask the same again and again, and to parse it takes 6 % of the loop's time for a request.
QUERIES_KEPT = 128

LIMITS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")

Schema = dict[str, Any]


class DecideQuery(BaseModel):
    """Query parameters of POST /decide: what a request grants, and what it insists on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget_ms: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="time from arrival within which the answer is wanted"
    )
    budget_gflops: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="most that the answer may cost, in 1e9 multiply-accumulates"
    )
    priority: int | None = Field(
        None,
        ge=LOWEST_PRIORITY,
        le=HIGHEST_PRIORITY,
        description="0 is normal; lower may be rejected or shed first; only a key may allow a higher one",
    )
    patch_grid: int | None = Field(None, ge=1, description="with keep_rate: a sub-network by name, not by budget")
    keep_rate: float | None = Field(
        None, gt=0, le=1, description="with patch_grid: a sub-network by name, of those that GET /subnetworks lists"
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> "DecideQuery":
        if (self.patch_grid is None) != (self.keep_rate is None):
            raise ValueError("patch_grid and keep_rate go together: give both or none")
        return self

    @property
    def subnetwork(self) -> SubNetwork | None:
        """The sub-network asked for by name."""
        if self.patch_grid is None or self.keep_rate is None:
            return None
        return SubNetwork(self.patch_grid, self.keep_rate)

    def request(
        self, arrived_at: float, top_k: int | None = None, address: str | None = None, key: ApiKey | None = None
    ) -> InferenceRequest:
        """Make what the pipeline takes."""
        return InferenceRequest(
            arrived_at,
            budget_ms=self.budget_ms,
            budget_gflops=self.budget_gflops,
            subnetwork=self.subnetwork,
            top_k=top_k,
            priority=self.priority,
            address=address,
            key=key,
        )


class ClassifyQuery(DecideQuery):
    """Query parameters of POST /classify."""

    min_confidence: float = Field(
        0, ge=0, lt=1, description="probability of the answer under which it is looked at again, if budgets allow it"
    )
    top_k: int | None = Field(
        None, ge=1, description=f"predictions to return, up to the number of classes; {DEFAULT_TOP_K} by default"
    )

    @model_validator(mode="after")
    def _one_look_by_name(self) -> "ClassifyQuery":
        if self.patch_grid is not None and self.min_confidence > 0:
            raise ValueError("min_confidence: a sub-network that is asked for by name looks once")
        return self

    def request(
        self, arrived_at: float, top_k: int | None = None, address: str | None = None, key: ApiKey | None = None
    ) -> InferenceRequest:
        """Make what the pipeline takes."""
        return replace(super().request(arrived_at, top_k, address, key), min_confidence=self.min_confidence)


Query = TypeVar("Query", bound=DecideQuery)


@lru_cache(QUERIES_KEPT)
def parse_query(query: bytes) -> ClassifyQuery:
    """Read the parameters of POST /classify from a query.

    Raises:
        InvalidParameterError: one is unusable, or given twice.
    """
    return _validated(ClassifyQuery, _once(_pairs(query)))


def parse_decide_query(query: bytes) -> DecideQuery:
    """Read the parameters of POST /decide; errors as `parse_query`."""
    return _validated(DecideQuery, _once(_pairs(query)))


def parse_parameters(query: bytes, beside: Iterable[tuple[str, Any]]) -> ClassifyQuery:
    """Read the parameters of a query and of what is beside the image; none may be in both.

    Raises:
        InvalidParameterError: one is unusable, or given twice.
    """
    return _validated(ClassifyQuery, _once([*_pairs(query), *beside]))


def _pairs(query: bytes) -> list[tuple[str, str]]:
    return parse_qsl(query.decode("latin-1"), keep_blank_values=True)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise InvalidParameterError(f"{name}: it is given twice", parameter=name)
        values[name] = value
    return values


def _validated(model: type[Query], values: Mapping[str, Any]) -> Query:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise invalid_parameter(error.errors()) from error


def describe_parameters(
    model: type[DecideQuery], profiles: ProfileTable, num_classes: int, highest_priority: int = 0
) -> dict[str, Schema]:
    """Describe parameters in OpenAPI's words, with the values that they may have for a checkpoint.

    Args:
        model: of the query.
        profiles: every sub-network that can be had by name.
        num_classes: of the checkpoint.
        highest_priority: that any request may have.

    Returns:
        The schema of each parameter by its name.
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
