"""The server's own HTTP routes."""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from service.domain import HIGHEST_PRIORITY, MAX_IMAGES, InferenceRequest
from service.errors import NotReadyError, ServiceError
from service.http.classify import Handle
from service.http.context import RouteContext
from service.http.descriptions import describe_forecast
from service.http.early_rejection import CLASSIFY_PATH
from service.http.error_shapes import describe_problem
from service.http.events import EventStream, LiveFeed, describe_events, is_stopping
from service.http.explain import make_explain
from service.http.feedback import BODY as FEEDBACK_BODY
from service.http.feedback import make_feedback
from service.http.forms import IMAGE_FIELD
from service.http.keys import key_of
from service.http.queries import Schema, describe_parameters, describe_query, nullable, parse_parameters
from service.http.request_ids import HEADER
from service.http.schemas import (
    ClassifyAnswer,
    DecideAnswer,
    ExplainAnswer,
    FeedbackAnswer,
    HealthAnswer,
    ReadyAnswer,
    ResourcesAnswer,
    ResultsAnswer,
    SubNetworksAnswer,
)
from service.http.uploads import read_parameters
from service.request_parameters import ClassifyQuery, DecideQuery
from service.telemetry.live import read_sample

BYTES: Schema = {"type": "string", "format": "binary"}
MANY: Schema = {"type": "array", "items": BYTES, "minItems": 1, "maxItems": MAX_IMAGES}
SERVER_TIMING = {"description": "the times of timing_ms, in milliseconds", "schema": {"type": "string"}}
REQUEST_ID = {"description": "the request's own ID, or a generated one", "schema": {"type": "string"}}
RETRY_AFTER = {"Retry-After": {"description": "seconds to wait before a retry", "schema": {"type": "integer"}}}


RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"headers": {"Server-Timing": SERVER_TIMING, HEADER: REQUEST_ID}},
    401: describe_problem("missing or unknown API key"),
    403: describe_problem("a page of another origin sent the request"),
    408: describe_problem("the body did not arrive in time"),
    413: describe_problem("the body or the image is too large"),
    415: describe_problem("unsupported content type or content encoding"),
    421: describe_problem("the Host header does not name this server"),
    422: describe_problem("a parameter, the budget or the image is invalid"),
    429: describe_problem("the request cannot be answered in time, or too many are waiting", RETRY_AFTER),
    500: describe_problem("the model failed"),
    503: describe_problem("not ready yet, or stopping", RETRY_AFTER),
    504: describe_problem("admitted, but the deadline can no longer be met"),
}
EVENTS_RESPONSES: dict[int | str, dict[str, Any]] = {200: describe_events(), 429: RESPONSES[429]}
FEEDBACK_RESPONSES: dict[int | str, dict[str, Any]] = {
    404: describe_problem("no answer with this request ID is remembered"),
    **{status: RESPONSES[status] for status in (401, 403, 408, 413, 421, 422, 429)},
}
DECIDE_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: RESPONSES[status] for status in (401, 403, 408, 413, 415, 421, 422, 429, 503)
}


def describe_body(parameters: Mapping[str, Schema]) -> Schema:
    """Return the OpenAPI description of POST /classify's body, which may hold the parameters instead of the query."""
    form: Schema = {IMAGE_FIELD: {"description": "one image or several", "anyOf": [BYTES, MANY]}, **parameters}
    members: Schema = {"image": {"type": "string", "description": "an image file as base64 or as a data URL"}}
    members |= {name: nullable(schema) for name, schema in parameters.items()}
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _object(form, IMAGE_FIELD)},
            "image/*": {"schema": BYTES},
            "application/octet-stream": {"schema": BYTES},
            "application/json": {"schema": _object(members, "image")},
        },
    }


def describe_decide_body(parameters: Mapping[str, Schema]) -> Schema:
    """Return the OpenAPI description of POST /decide's body, which may hold the parameters instead of the query."""
    members = _object({name: nullable(schema) for name, schema in parameters.items()})
    return {"required": False, "content": {"application/json": {"schema": members}}}


def _object(properties: Schema, *required: str) -> Schema:
    described = {"type": "object", "properties": properties, "additionalProperties": False}
    return described | {"required": list(required)} if required else described


def build_router(context: RouteContext, classify: Handle) -> APIRouter:
    """Create the routes for clients."""
    router = APIRouter()
    profiles = context.checkpoint.profile.with_interpolated_rates(context.checkpoint.config)
    # The routes parse their queries themselves, in a tenth of FastAPI's time, and so describe them themselves, too.
    of_classify, of_decide = (
        describe_parameters(
            model, profiles, len(context.checkpoint.class_names), 0 if context.keys is None else HIGHEST_PRIORITY
        )
        for model in (ClassifyQuery, DecideQuery)
    )
    router.add_api_route(
        CLASSIFY_PATH,
        classify,
        methods=["POST"],
        response_model=ClassifyAnswer | ResultsAnswer,
        responses=RESPONSES,
        openapi_extra={"requestBody": describe_body(of_classify), "parameters": describe_query(of_classify)},
    )

    router.add_api_route(
        "/explain",
        make_explain(context),
        methods=["POST"],
        response_model=ExplainAnswer,
        responses=RESPONSES,
        openapi_extra={"requestBody": describe_body(of_classify), "parameters": describe_query(of_classify)},
    )

    @router.post(
        "/decide",
        responses=DECIDE_RESPONSES,
        openapi_extra={"requestBody": describe_decide_body(of_decide), "parameters": describe_query(of_decide)},
    )
    async def decide(request: Request) -> DecideAnswer:
        """Return what the scheduler would choose for a request now, without running it."""
        further = await read_parameters(request, context.bodies)
        query = parse_parameters(DecideQuery, request.scope["query_string"], further)
        pipeline = context.open_server().pipeline
        wanted = query.request(context.clock(), key=key_of(request.scope))
        return describe_forecast(pipeline.decide(wanted), pipeline.checkpoint.config)

    router.add_api_route(
        "/feedback",
        make_feedback(context),
        methods=["POST"],
        response_model=FeedbackAnswer,
        responses=FEEDBACK_RESPONSES,
        openapi_extra={"requestBody": FEEDBACK_BODY},
    )

    @router.get("/subnetworks", responses={503: RESPONSES[503]})
    async def subnetworks() -> SubNetworksAnswer:
        """List every sub-network with its cost, its accuracy and its latency on this machine."""
        return context.server().describe_subnetworks()

    @router.head("/health/live", include_in_schema=False)
    @router.get("/health/live")
    async def live() -> HealthAnswer:
        """Return 200 as long as the process answers."""
        return HealthAnswer(status="live")

    @router.head("/health/ready", include_in_schema=False)
    @router.get("/health/ready", responses={503: RESPONSES[503]})
    async def ready() -> ReadyAnswer:
        """Return 200 once the model has answered its first batch, while requests are taken and do not all fail."""
        server = context.open_server()
        if context.failures.is_persistent:
            raise NotReadyError("every recent request failed inside the server; see its log")
        return ReadyAnswer(status="ready", profile_measured=round(server.measured_share(), 3))

    return router


def build_operations_router(context: RouteContext) -> APIRouter:
    """Create the routes for operators: the state of the server and its machine."""
    router = APIRouter()

    @router.get("/resources", responses={503: RESPONSES[503]})
    async def resources() -> ResourcesAnswer:
        """Return the state of the machine and the scheduler's estimates."""
        server, now = context.server(), context.clock()
        state = server.scheduler.state(now)
        try:
            pipeline = context.open_server().pipeline
            forecast = describe_forecast(pipeline.decide(InferenceRequest(now)), pipeline.checkpoint.config)
        except ServiceError:
            forecast = None
        snapshot = context.monitor.latest
        return ResourcesAnswer(
            snapshot=asdict(snapshot),
            age_s=round(now - snapshot.taken_at, 3),
            queued=len(server.scheduler),
            arrival_rate=round(state.arrival_rate, 3),
            slowdown=round(state.slowdown, 3),
            expected_from_others=round(server.scheduler.prior_slowdown, 3),
            overhead_factor=round(state.overhead_factor, 3),
            safety_factor=round(state.safety_factor, 3),
            max_batch_size=state.max_batch_size,
            next_without_budget=forecast,
        )

    feed = LiveFeed(lambda: read_sample(context.metrics.registry()), lambda: is_stopping(context.state()))

    @router.get("/events", response_class=EventStream, responses=EVENTS_RESPONSES)
    async def events() -> EventStream:
        """Stream the main metrics as server-sent events, one a second: counters and gauges."""
        return EventStream.of(feed)

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        """Return all metrics in the Prometheus text format, or in OpenMetrics with exemplars that link to traces."""
        context.report()
        # On a thread: slow with many worker processes.
        page, media_type = await asyncio.to_thread(context.metrics.page, request.headers.get("accept", ""))
        return Response(page, media_type=media_type)

    return router
