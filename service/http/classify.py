"""POST /classify: classify one image or several, sent as the body, in a form or in JSON."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.domain import InferenceRequest
from service.errors import InvalidParameterError, ServiceError, UploadTimeoutError
from service.http.callers import caller_of
from service.http.context import ReadyServer, RouteContext
from service.http.descriptions import describe_answer
from service.http.disconnects import ClientWatch
from service.http.early_rejection import RESERVED
from service.http.error_responses import ErrorAnswers, describe_error
from service.http.forms import IMAGE_FIELD
from service.http.keys import key_of
from service.http.queries import parse_parameters, parse_query
from service.http.schemas import ClassifyAnswer, TimingAnswer
from service.http.uploads import BodyKind, kind_of_body, read_body, read_form, read_json
from service.request_parameters import ClassifyQuery
from service.scheduling.state import QueuedRequest
from service.telemetry.outcomes import counting_failures

Handle = Callable[[Request], Awaitable[Response]]
ReadBytes = Callable[[float], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class DirectRoute:
    """A route of DirectRoutes, with the one attribute that reports read: its path, `{name}` for a model's name."""

    path: str


class DirectRoutes:
    """Middleware that answers POST on a few paths and passes everything else on to FastAPI.

    FastAPI has these routes too, for the OpenAPI description. Routing and wrapping the handler take FastAPI and
    Starlette a tenth of the time that the event loop spends on a classification.
    """

    def __init__(
        self, app: ASGIApp, find: Callable[[str], tuple[DirectRoute, Handle] | None], errors: ErrorAnswers
    ) -> None:
        """Create the middleware.

        Args:
            app: the application that gets all other requests.
            find: returns the route and the handler of a path; None where the path is not one of these.
            errors: makes the response where the handler raises a ServiceError.
        """
        self._app, self._find, self._errors = app, find, errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or pass it on."""
        found = self._find(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        scope["route"], handle = found  # as FastAPI records its own route
        request = Request(scope, receive, send)
        try:
            response = await handle(request)
        except ServiceError as error:
            response = await self._errors.on_service_error(request, error)
        await response(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Upload:
    """A parsed request and the server for it, which is to answer it even if it is told to stop in the meantime."""

    server: ReadyServer
    reads: tuple[ReadBytes, ...]
    wanted: InferenceRequest
    reserved: QueuedRequest | None = None


def make_classify(context: RouteContext) -> Handle:
    """Create the handler of POST /classify."""

    async def classify(request: Request) -> Response:
        """Classify an image with the best sub-network that budgets, load and machine allow at this moment.

        The image is the body itself, a part of a form, whose other fields are parameters, or the base64 text `image` of
        a JSON object, whose other members are parameters. Each of several images of a form gets its own answer.
        """
        watch = ClientWatch(request)
        with counting_failures(context.metrics, key_of(request.scope)):
            upload = await read_upload(context, request, watch)

        async def answer(read: ReadBytes, image: int = 0) -> ClassifyAnswer:
            classify, wanted = context.classifier.classify, replace(upload.wanted, image=image)
            with context.failures.counting():
                classification = await classify(upload.server.pipeline, read, wanted, watch, upload.reserved)
                return describe_answer(classification, upload.server.checkpoint)

        if len(upload.reads) == 1:
            return respond(await answer(upload.reads[0]))
        results = await asyncio.gather(*(_result(answer(read, image)) for image, read in enumerate(upload.reads)))
        return Response(b'{"results":[%s]}' % b",".join(results), media_type="application/json")

    return classify


async def read_upload(
    context: RouteContext, request: Request, watch: ClientWatch, image_fields: tuple[str, ...] = (IMAGE_FIELD,)
) -> Upload:
    """Parse a request. The body of a form or of JSON is read whole, for it may hold parameters.

    Args:
        context: the collaborators of the routes.
        request: the request, its body not yet read.
        watch: started once the body has been read.
        image_fields: names of the form fields that hold images, as in FormReader.

    Raises:
        ServiceError: the request is unusable or would be rejected, or the server takes no requests.
    """
    query_string, caller = request.scope["query_string"], caller_of(request, context.clock)
    address, key, arrived_at = caller.address, caller.key, caller.arrived_at
    server, kind = context.open_server(), kind_of_body(request.headers)
    limits = context.bodies
    if kind is BodyKind.IMAGE:
        query = parse_query(query_string)

        async def read(within_s: float) -> bytes:
            data = await read_body(request, limits, within_s)
            watch.start()
            return data

        wanted = query.request(arrived_at, address, key)
        if (reserved := request.scope.get(RESERVED)) is not None:
            return Upload(reserved.server, (read,), wanted, reserved.request)
        return Upload(server, (read,), wanted)

    pipeline = server.pipeline
    pipeline.check_room()
    within_s = limits.max_s  # the body may hold the budget, unless the query does
    known: ClassifyQuery | None = None
    with suppress(InvalidParameterError):  # the query is validated again below, with the body's fields
        known = parse_query(query_string)
    if known is not None:
        alone = known.request(arrived_at, key=key)
        pipeline.check(alone)
        if alone.budget_ms is not None:
            within_s = pipeline.time_left_s(alone)
    if kind is BodyKind.FORM:
        form = await read_form(request, limits, within_s, image_fields)
    else:
        form = await read_json(request, limits, within_s)
    parameters = (
        parse_parameters(ClassifyQuery, query_string, form.fields) if form.fields else parse_query(query_string)
    )
    wanted = parameters.request(arrived_at, address, key)
    server = context.servers()[0]  # a swap may have replaced it; a stopping server still answers what it has read
    server.pipeline.check(wanted)
    if server.pipeline.time_left_s(wanted) <= 0:
        raise UploadTimeoutError("the body did not arrive within the latency budget")
    return Upload(server, tuple(_already_read(image, watch) for image in form.images), wanted)


def _already_read(image: bytes, watch: ClientWatch) -> ReadBytes:
    async def read(_: float) -> bytes:
        watch.start()
        return image

    return read


def respond(answer: ClassifyAnswer) -> Response:
    """Serialise an answer."""
    # Not left to FastAPI, which would validate the whole answer once more.
    return Response(answer.model_dump_json(), media_type="application/json", headers=timing_header(answer.timing_ms))


def timing_header(timing_ms: TimingAnswer) -> dict[str, str]:
    """Return the Server-Timing header with the time of each stage."""
    stages: dict[str, Any] = timing_ms.model_dump()
    return {"Server-Timing": ", ".join(f"{stage};dur={ms}" for stage, ms in stages.items())}


async def _result(answering: Awaitable[ClassifyAnswer]) -> bytes:
    """Serialise one of several answers, or the error in its place, with its status."""
    try:
        answer = (await answering).model_dump_json()
    except ServiceError as error:
        _, described = describe_error(error)
        return described.model_dump_json().encode()
    return f'{{"status":200,{answer.removeprefix("{")}'.encode()
