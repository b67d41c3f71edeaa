"""The parameters that a request carries beside its image, in any protocol, as pydantic models."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.subnetwork import SubNetwork
from service.domain import DEFAULT_TOP_K, HIGHEST_PRIORITY, LOWEST_PRIORITY, ApiKey, InferenceRequest
from service.errors import invalid_parameter


class DecideQuery(BaseModel):
    """Query parameters of POST /decide: budgets, priority and a sub-network by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget_ms: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="latency budget, from the arrival of the request"
    )
    budget_gflops: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="maximum cost of the answer, in 1e9 multiply-accumulates"
    )
    priority: int | None = Field(
        None,
        ge=LOWEST_PRIORITY,
        le=HIGHEST_PRIORITY,
        description="0 is normal; lower may be rejected or shed first; only a key may allow a higher one",
    )
    patch_grid: int | None = Field(None, ge=1, description="with keep_rate: a sub-network by name")
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
        """The sub-network requested by name; None where there is none."""
        if self.patch_grid is None or self.keep_rate is None:
            return None
        return SubNetwork(self.patch_grid, self.keep_rate)

    def request(self, arrived_at: float, address: str | None = None, key: ApiKey | None = None) -> InferenceRequest:
        """Return the request for the pipeline."""
        return InferenceRequest(
            arrived_at,
            budget_ms=self.budget_ms,
            budget_gflops=self.budget_gflops,
            subnetwork=self.subnetwork,
            priority=self.priority,
            address=address,
            key=key,
        )


class ClassifyQuery(DecideQuery):
    """Query parameters of POST /classify."""

    min_confidence: float = Field(
        0, ge=0, lt=1, description="probability of the answer below which the server looks again, if budgets allow"
    )
    top_k: int | None = Field(
        None, ge=1, description=f"predictions to return, up to the number of classes; {DEFAULT_TOP_K} by default"
    )

    @model_validator(mode="after")
    def _one_look_by_name(self) -> "ClassifyQuery":
        if self.patch_grid is not None and self.min_confidence > 0:
            raise ValueError("min_confidence: not allowed with a sub-network by name, which looks once")
        return self

    def request(self, arrived_at: float, address: str | None = None, key: ApiKey | None = None) -> InferenceRequest:
        """Return the request for the pipeline."""
        request = super().request(arrived_at, address, key)
        return replace(request, min_confidence=self.min_confidence, top_k=self.top_k)


M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], values: Mapping[str, Any] | bytes) -> M:
    """Validate parameters given by name, or a message in JSON.

    Raises:
        InvalidParameterError: a parameter is invalid, or the message is not valid JSON.
    """
    try:
        return model.model_validate_json(values) if isinstance(values, bytes) else model.model_validate(values)
    except ValidationError as error:
        raise invalid_parameter(error.errors(include_url=False, include_input=False)) from error
