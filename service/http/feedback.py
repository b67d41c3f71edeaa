"""POST /feedback: the correct class of an earlier answer, from a client that knows it."""

from collections.abc import Awaitable, Callable, Sequence

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.errors import InvalidParameterError
from service.http.context import RouteContext
from service.http.keys import key_of
from service.http.queries import Schema
from service.http.schemas import FeedbackAnswer
from service.http.uploads import read_message


class FeedbackBody(BaseModel):
    """Body of POST /feedback."""

    model_config = ConfigDict(extra="forbid", strict=True)

    request_id: str = Field(min_length=1, description="X-Request-ID of the request that was answered")
    image: int = Field(0, ge=0, description="index of the image, from 0, if the request had several")
    label: str | None = Field(None, description="name of the correct class")
    index: int | None = Field(None, ge=0, description="index of the correct class")

    @model_validator(mode="after")
    def _one_class(self) -> "FeedbackBody":
        if (self.label is None) == (self.index is None):
            raise ValueError("label or index: exactly one of them is required")
        return self


BODY: Schema = {"required": True, "content": {"application/json": {"schema": FeedbackBody.model_json_schema()}}}


def make_feedback(context: RouteContext) -> Callable[[Request], Awaitable[FeedbackAnswer]]:
    """Create the handler of POST /feedback."""

    async def feedback(request: Request) -> FeedbackAnswer:
        """Report the correct class of an earlier answer. Only the first report on an answer counts."""
        body = await read_message(request, context.bodies, FeedbackBody)
        answer = context.answers.find(key_of(request.scope), body.request_id, body.image)
        _check_class(body, answer.class_names)
        is_first = not answer.is_judged
        # Compared by label where one is given: several classes may share it.
        is_correct = body.index == answer.index if body.label is None else body.label == answer.label
        answer.is_judged = True
        if counts := is_first and answer.expected_top1 is not None:
            context.metrics.audits.judged(answer.subnetwork, answer.expected_top1, is_correct=is_correct)
        return FeedbackAnswer(correct=is_correct, counted=counts)

    return feedback


def _check_class(body: FeedbackBody, class_names: Sequence[str]) -> None:
    """Check that the model that answered has the reported class.

    Raises:
        InvalidParameterError: the model has no such class.
    """
    if body.label is None and (body.index is None or body.index >= len(class_names)):
        message = f"index: the model that answered has {len(class_names)} classes, numbered from 0"
        raise InvalidParameterError(message, parameter="index")
    if body.label is not None and body.label not in class_names:
        raise InvalidParameterError("label: the model that answered has no such class", parameter="label")
