"""The HTTP routes: requests in, answers out."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import ValidationError
from starlette.datastructures import QueryParams

from models.checkpoint import Checkpoint
from service.domain import Classification, InferenceRequest, ServerState
from service.errors import NotReadyError, ServiceError, invalid_parameter
from service.http.disconnects import ClientWatch
from service.http.request_ids import HEADER
from service.http.schemas import (
    ClassifyAnswer,
    ClassifyQuery,
    DecideAnswer,
    DecideQuery,
    ErrorAnswer,
    HealthAnswer,
    ResourcesAnswer,
    SubNetworksAnswer,
    describe_answer,
    describe_forecast,
    describe_parameters,
)
from service.http.uploads import read_image
from service.machine.monitor import Monitor
from service.pipeline import Pipeline
from service.scheduling.scheduler import Scheduler
from service.telemetry.metrics import CONTENT_TYPE, Metrics
from service.telemetry.outcomes import counted

CLASSIFY_PATH = "/classify"
# Most clients ask the same again and again, and to parse it takes 6 % of the loop's time for a request.
QUERIES_KEPT = 128

Handle = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class ReadyServer:
    """What there is once the server is ready."""

    pipeline: Pipeline
    scheduler: Scheduler
    family: SubNetworksAnswer


@dataclass(frozen=True, slots=True)
class RouteContext:
    """What the routes call upon.

    Attributes:
        checkpoint: what is served.
        metrics: what is counted.
        monitor: looks at the machine.
        max_body_bytes: most of a body that is read.
        max_upload_s: longest time that a body may take to arrive.
        state: tells what the server is at.
        server: yields what serves; raises a NotReadyError until there is one.
        report: records the state of machine and scheduler in the metrics.
        clock: monotonic, in seconds.
    """

    checkpoint: Checkpoint
    metrics: Metrics
    monitor: Monitor
    max_body_bytes: int
    max_upload_s: float
    state: Callable[[], ServerState]
    server: Callable[[], ReadyServer]
    report: Callable[[], None]
    clock: Callable[[], float] = time.monotonic

    def open_server(self) -> ReadyServer:
        """Return what serves, where it takes requests.

        Raises:
            NotReadyError: it does not yet, or no longer.
        """
        server = self.server()
        if self.state() is not ServerState.READY:
            raise NotReadyError("the server is stopping; try again in a moment")
        return server


IMAGE_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": {"type": "string", "format": "binary"}},
            }
        },
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}
# The route reads its query itself, at a tenth of what FastAPI takes for it, so it describes it itself as well.
CLASSIFY_INPUT = {"requestBody": IMAGE_BODY, "parameters": describe_parameters(ClassifyQuery)}
SERVER_TIMING = {"description": "the times of timing_ms, in milliseconds", "schema": {"type": "string"}}
REQUEST_ID = {"description": "the request's own, or one that was made for it", "schema": {"type": "string"}}
RETRY_AFTER = {"Retry-After": {"description": "seconds to wait before the next try", "schema": {"type": "integer"}}}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"headers": {"Server-Timing": SERVER_TIMING, HEADER: REQUEST_ID}},
    408: {"model": ErrorAnswer, "description": "the body did not arrive in time"},
    413: {"model": ErrorAnswer, "description": "the body or the image is too large"},
    415: {"model": ErrorAnswer, "description": "the content type is no image"},
    422: {"model": ErrorAnswer, "description": "a parameter, the budget or the image is unusable"},
    429: {
        "model": ErrorAnswer,
        "description": "it could not be answered in time, or too much waits",
        "headers": RETRY_AFTER,
    },
    500: {"model": ErrorAnswer, "description": "the model failed"},
    503: {"model": ErrorAnswer, "description": "not ready yet, or stopping", "headers": RETRY_AFTER},
    504: {"model": ErrorAnswer, "description": "admitted, but the deadline can no longer be met"},
}
DECIDE_RESPONSES: dict[int | str, dict[str, Any]] = {status: RESPONSES[status] for status in (422, 429, 503)}


def make_classify(context: RouteContext) -> Handle:
    """Make what answers POST /classify."""

    async def classify(request: Request) -> Response:
        """Classify an image with the best sub-network that budgets, load and machine allow at this moment.

        The image comes as the multipart field `file`, or as the body itself.
        """
        arrived_at = context.clock()
        with counted(context.metrics) as record:
            query = _parse_query(request.scope["query_string"])
            answer = await _classify(context, request, _wanted(query, arrived_at, query.top_k))
            record(answer)
        described = describe_answer(answer, context.checkpoint)
        stages = described.timing_ms.model_dump()
        timing = ", ".join(f"{stage};dur={ms}" for stage, ms in stages.items())
        # Made here, because FastAPI would validate the whole answer once more.
        return Response(described.model_dump_json(), media_type="application/json", headers={"Server-Timing": timing})

    return classify


def build_router(context: RouteContext, classify: Handle) -> APIRouter:
    """Make the routes over `context`."""
    router = APIRouter()
    config = context.checkpoint.config
    router.add_api_route(
        CLASSIFY_PATH,
        classify,
        methods=["POST"],
        response_model=ClassifyAnswer,
        responses=RESPONSES,
        openapi_extra=CLASSIFY_INPUT,
    )

    @router.post("/decide", responses=DECIDE_RESPONSES)
    async def decide(query: Annotated[DecideQuery, Query()]) -> DecideAnswer:
        """Tell what would be chosen for a request at this moment, without running anything."""
        pipeline = context.open_server().pipeline
        return describe_forecast(pipeline.decide(_wanted(query, context.clock())), config)

    @router.get("/subnetworks", responses={503: RESPONSES[503]})
    async def subnetworks() -> SubNetworksAnswer:
        """List every sub-network with its cost, its accuracy and its latency on this machine."""
        return context.server().family

    @router.get("/resources", responses={503: RESPONSES[503]})
    async def resources() -> ResourcesAnswer:
        """Tell what the machine looks like, and what the policy makes of it."""
        server, now = context.server(), context.clock()
        state = server.scheduler.state(now)
        try:
            forecast = describe_forecast(context.open_server().pipeline.decide(InferenceRequest(now)), config)
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

    @router.head("/health/live", include_in_schema=False)
    @router.get("/health/live")
    async def live() -> HealthAnswer:
        """Tell that the process answers."""
        return HealthAnswer(status="live")

    @router.head("/health/ready", include_in_schema=False)
    @router.get("/health/ready", responses={503: RESPONSES[503]})
    async def ready() -> HealthAnswer:
        """Tell whether the model has answered its first batch and requests are welcome."""
        context.open_server()
        return HealthAnswer(status="ready")

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Give all metrics in the Prometheus text format."""
        context.report()
        return Response(
            await asyncio.to_thread(context.metrics.page), media_type=CONTENT_TYPE
        )  # of many processes, slow

    return router


@lru_cache(QUERIES_KEPT)
def _parse_query(query_string: bytes) -> ClassifyQuery:
    """Read the query parameters.

    Raises:
        InvalidParameterError: one is unusable.
    """
    try:
        return ClassifyQuery.model_validate(dict(QueryParams(query_string)))
    except ValidationError as error:
        raise invalid_parameter(error.errors()) from error


def _wanted(query: DecideQuery, arrived_at: float, top_k: int | None = None) -> InferenceRequest:
    return InferenceRequest(
        arrived_at, query.budget_ms, query.budget_gflops, query.subnetwork, top_k, priority=query.priority
    )


async def _classify(context: RouteContext, request: Request, wanted: InferenceRequest) -> Classification:
    """Classify, and stop wherever the request stands once its client is gone.

    Raises:
        ServiceError: the request is rejected, or fails.
    """
    pipeline, watch = context.open_server().pipeline, ClientWatch(request)

    async def read(within_s: float) -> bytes:
        data = await read_image(request, context.max_body_bytes, context.max_upload_s, within_s)
        watch.start()
        return data

    return await pipeline.classify(read, wanted, watch)
