"""GET and PUT /admin/model: read and replace the served model."""

from datetime import datetime
from typing import Any, Protocol

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from service.errors import ForeignOriginError
from service.http.context import RouteContext
from service.http.descriptions import describe_model
from service.http.error_shapes import describe_problem
from service.http.origins import is_known_host
from service.http.queries import Schema
from service.http.routes import RESPONSES
from service.http.schemas import ModelAnswer
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

    share: float = Field(gt=0, le=1, description="fraction of the requests")
    seconds: float = Field(gt=0, le=86_400, description="duration of the trial")


class ModelBody(BaseModel):
    """Body of PUT /admin/model."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str = Field(min_length=1, description="a path, the name of a bundled checkpoint, or hf-hub:owner/name")
    least_agreement: float = Field(
        LEAST_AGREEMENT, ge=0, le=1, description="minimum share of recent images that both models classify alike"
    )
    most_slowdown: float = Field(
        MOST_SLOWDOWN, gt=0, allow_inf_nan=False, description="maximum latency and cost, relative to the old model's"
    )
    force: bool = Field(False, description="serve it even if it cannot be compared or fails the comparison")
    shadow: TrialBody | None = Field(None, description="first compare it on live images for a time")
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

    checkpoint: str = Field(description="as requested")
    began_at: datetime
    step: ChangeStep = Field(description="current step, or the one in which the change ended")
    outcome: ChangeOutcome | None = Field(description="null while the change is running")
    message: str | None = Field(description="why the change is not done; null if it is done or running")
    name: str | None
    version: str | None
    num_compared: int = Field(description="images that both models have answered")
    agreement: float | None = Field(description="share of these images to which both models gave the same class")
    latency_ratio: float | None = Field(description="median of the new model's latency divided by the old model's")
    seconds: float | None = Field(description="duration of the change; null while it is running")


class AdminModelAnswer(BaseModel):
    """Answer to GET and PUT /admin/model."""

    model: ModelAnswer = Field(description="the served model")
    change: ChangeAnswer | None = Field(description="the running change, or the last one; null before the first")


def build_admin_router(context: RouteContext, changer: Changer) -> APIRouter:
    """Create the routes."""
    router = APIRouter()
    errors: dict[int | str, dict[str, Any]] = {
        401: RESPONSES[401],
        403: describe_problem("a page of another origin sent the request, or a page sent it to an unknown host name"),
        408: RESPONSES[408],
        409: describe_problem("another change is running, or changes are not allowed here"),
        413: describe_problem("the body is too large"),
        421: RESPONSES[421],
        422: describe_problem("the body is invalid"),
        429: describe_problem("too many bodies of this client are arriving"),
        503: describe_problem(RESPONSES[503]["description"]),
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
            raise ForeignOriginError("a page may change the model only if --allowed-hosts lists the server's host name")
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
