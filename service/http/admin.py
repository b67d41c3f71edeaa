"""GET and PUT /admin/model: read and replace the served model."""

from datetime import datetime
from typing import Any, Protocol

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from service.errors import ForeignOriginError
from service.http.context import RouteContext
from service.http.descriptions import describe_model
from service.http.origins import is_known_host
from service.http.queries import Schema
from service.http.schemas import ErrorAnswer, ModelAnswer
from service.http.uploads import read_message
from service.model_change import (
    LEAST_AGREEMENT,
    MOST_SLOWDOWN,
    ChangeOutcome,
    ChangeReport,
    ChangeStep,
    ModelChange,
    Trial,
)

PATH = "/admin/model"


class Changer(Protocol):
    """Replaces the served model."""

    @property
    def report(self) -> ChangeReport | None:
        """The progress of the running change, or the result of the last one."""
        ...

    def ask(self, change: ModelChange) -> ChangeReport:
        """Start a change."""
        ...


class TrialBody(BaseModel):
    """A trial of the new model beside the old one."""

    model_config = ConfigDict(extra="forbid")

    share: float = Field(gt=0, le=1, description="of the requests")
    seconds: float = Field(gt=0, le=86_400, description="for which")


class ModelBody(BaseModel):
    """Body of PUT /admin/model."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str = Field(min_length=1, description="a path, the name of one that ships, or hf-hub:owner/name")
    least_agreement: float = Field(
        LEAST_AGREEMENT, ge=0, le=1, description="share of recent images on which it must say what the old one says"
    )
    most_slowdown: float = Field(
        MOST_SLOWDOWN, gt=0, allow_inf_nan=False, description="times the old one's latency, and cost, that it may take"
    )
    force: bool = Field(False, description="serve it even where it cannot be compared, or is found wanting")
    shadow: TrialBody | None = Field(None, description="compare it on live images for a time, before it answers any")
    canary: TrialBody | None = Field(None, description="let it answer a share of the requests before it answers all")

    def change(self) -> ModelChange:
        """Convert the body to a ModelChange."""
        shadow, canary = (
            None if each is None else Trial(each.share, each.seconds) for each in (self.shadow, self.canary)
        )
        return ModelChange(
            self.checkpoint, self.least_agreement, self.most_slowdown, self.force, shadow=shadow, canary=canary
        )


class ChangeAnswer(BaseModel):
    """A change of the model, running or ended."""

    checkpoint: str = Field(description="as it was asked for")
    began_at: datetime
    step: ChangeStep = Field(description="that it is at, or ended in")
    outcome: ChangeOutcome | None = Field(description="null while it goes on")
    message: str | None = Field(description="why it is not done")
    name: str | None
    version: str | None
    num_compared: int = Field(description="images that both models have answered")
    agreement: float | None = Field(description="share of them to which both gave the same name")
    latency_ratio: float | None = Field(description="median of the new one's latency over the old one's")
    seconds: float | None = Field(description="that it has taken")


class AdminModelAnswer(BaseModel):
    """Answer to GET and PUT /admin/model."""

    model: ModelAnswer = Field(description="what is served")
    change: ChangeAnswer | None = Field(description="the one that goes on, or the last; null before the first")


def build_admin_router(context: RouteContext, changer: Changer) -> APIRouter:
    """Create the routes."""
    router = APIRouter()
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorAnswer, "description": description}
        for status, description in {
            401: "the server asks for a key, and this is none",
            403: "a page of another site asks, or one at a name that is not known to be the server's",
            409: "another change goes on, or none may be asked for here",
            422: "the body is unusable",
            503: "not ready yet, or stopping",
        }.items()
    }

    def describe() -> AdminModelAnswer:
        report = changer.report
        change = None if report is None else ChangeAnswer.model_validate(report, from_attributes=True)
        return AdminModelAnswer(model=describe_model(context.checkpoint), change=change)

    @router.get(PATH)
    async def model() -> AdminModelAnswer:
        """Return the served model, and the progress of the running change or the result of the last one."""
        return describe()

    @router.put(PATH, status_code=202, responses=errors, openapi_extra={"requestBody": _describe_body()})
    async def change_model(request: Request) -> AdminModelAnswer:
        """Start to replace the served model with another one; GET returns the progress."""
        # DNS rebinding: a site can point its own name at this server, and its pages then pass for the server's own.
        hosts = context.allowed_hosts or ("localhost",)
        if "origin" in request.headers and not is_known_host(request.headers.get("host"), hosts):
            raise ForeignOriginError("a page changes the model only where --allowed-hosts names the server it asks")
        context.open_server()
        body = await read_message(request, context.bodies, ModelBody)
        changer.ask(body.change())
        return describe()

    return router


def _describe_body() -> Schema:
    """Return the OpenAPI description of the PUT body; schemas there cannot have definitions of their own."""
    schema = ModelBody.model_json_schema()
    trial = schema.pop("$defs")[TrialBody.__name__]
    for name in ("shadow", "canary"):
        schema["properties"][name]["anyOf"][0] = trial
    return {"required": True, "content": {"application/json": {"schema": schema}}}
