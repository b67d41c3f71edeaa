"""What a request says beside its image, in its query, in the fields of its form or in its JSON, as pydantic models."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.subnetwork import SubNetwork
from service.domain import DEFAULT_TOP_K, InferenceRequest
from service.errors import InvalidParameterError, invalid_parameter

LOWEST_PRIORITY = -10  # more than a handful of classes cannot be told apart
# Most clients ask the same again and again, and to parse it takes 6 % of the loop's time for a request.
QUERIES_KEPT = 128


class DecideQuery(BaseModel):
    """Query parameters of POST /decide: what a request grants, and what it insists on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget_ms: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="time from arrival within which the answer is wanted"
    )
    budget_gflops: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="most that the answer may cost, in 1e9 multiply-accumulates"
    )
    priority: int = Field(0, ge=LOWEST_PRIORITY, le=0, description="0 is normal; lower may be rejected or shed first")
    patch_grid: int | None = Field(None, ge=1, description="with keep_rate: a sub-network by name, not by budget")
    keep_rate: float | None = Field(None, gt=0, le=1, description="with patch_grid: a sub-network by name")

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

    def request(self, arrived_at: float, top_k: int | None = None, address: str | None = None) -> InferenceRequest:
        """Make what the pipeline takes."""
        return InferenceRequest(
            arrived_at, self.budget_ms, self.budget_gflops, self.subnetwork, top_k, self.priority, address
        )


class ClassifyQuery(DecideQuery):
    """Query parameters of POST /classify."""

    top_k: int | None = Field(
        None, ge=1, description=f"predictions to return, up to the number of classes; {DEFAULT_TOP_K} by default"
    )


class ClassifyBody(ClassifyQuery):
    """JSON body of POST /classify; the parameters may stand in the query instead."""

    image: str = Field(description="the bytes of the file in base64, or a data URL with them")


@lru_cache(QUERIES_KEPT)
def parse_query(query: bytes) -> ClassifyQuery:
    """Read the parameters of a query.

    Raises:
        InvalidParameterError: one is unusable.
    """
    return _validated(_once(_pairs(query)))


def parse_parameters(query: bytes, beside: Iterable[tuple[str, Any]]) -> ClassifyQuery:
    """Read the parameters of a query and of what is beside the image; none may be in both.

    Raises:
        InvalidParameterError: one is unusable, or given twice.
    """
    return _validated(_once([*_pairs(query), *beside]))


def _pairs(query: bytes) -> list[tuple[str, str]]:
    return parse_qsl(query.decode("latin-1"), keep_blank_values=True)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise InvalidParameterError(f"{name}: it is given twice", parameter=name)
        values[name] = value
    return values


def _validated(values: Mapping[str, Any]) -> ClassifyQuery:
    try:
        return ClassifyQuery.model_validate(values)
    except ValidationError as error:
        raise invalid_parameter(error.errors()) from error


def describe_parameters(query: type[BaseModel]) -> list[dict[str, Any]]:
    """Describe the fields of a query model as the parameters of an OpenAPI operation."""
    schema = query.model_json_schema()
    return [
        {
            "name": name,
            "in": "query",
            "required": name in schema.get("required", ()),
            "description": field.get("description", ""),
            "schema": {key: value for key, value in field.items() if key != "description"},
        }
        for name, field in schema["properties"].items()
    ]
