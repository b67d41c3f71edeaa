"""The HTTP routes: requests in, answers out."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from pydantic import ValidationError
from starlette.datastructures import QueryParams

from models.checkpoint import Checkpoint
from service.domain import Classification, InferenceRequest
from service.errors import ClientGoneError, NotReadyError, ServiceError
from service.line import Line
from service.metrics import CONTENT_TYPE, Metrics
from service.monitor import Monitor
from service.pipeline import GONE, Pipeline
from service.request_ids import HEADER
from service.schemas import (
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
from service.shortcut import Handle
from service.uploads import read_image, wait_until_gone

CLASSIFY_PATH = "/classify"
PATIENCE_S = 0.02  # a quick answer is not worth watching over its client
# Most clients ask the same again and again, and to parse it takes 6 % of the loop's time for a request.
QUERIES_KEPT = 128


@dataclass(frozen=True, slots=True)
class Serving:
    """What there is once the server is ready."""

    pipeline: Pipeline
    line: Line
    family: SubNetworksAnswer


@dataclass(slots=True)
class Api:
    """What the routes call upon."""

    checkpoint: Checkpoint
    metrics: Metrics
    monitor: Monitor
    max_body_bytes: int
    max_upload_s: float
    clock: Callable[[], float] = time.monotonic
    serving: Serving | None = None

    def serve(self, serving: Serving) -> None:
        """Welcome requests from now on."""
        self.serving = serving
        serving.pipeline.ready()

    def count_refusal(self, path: str, code: str) -> None:
        """Count a classification that was refused before the pipeline could count it."""
        if path == CLASSIFY_PATH:
            self.metrics.request_refused(code)

    def report(self) -> None:
        """Record the machine's state and the line's, for whoever reads the metrics next."""
        if self.serving is not None:
            line = self.serving.line
            situation = line.situation(self.clock())
            self.metrics.machine(self.monitor.latest, len(line), situation.slowdown, situation.prudence)
            self.metrics.ready(self.serving.pipeline.is_ready)

    async def report_regularly(self, interval_s: float) -> None:
        """Report until cancelled: where there are several workers, only one of them is asked for the metrics."""
        while True:
            await asyncio.sleep(interval_s)
            self.report()

    def drain(self) -> None:
        """Refuse newcomers from now on."""
        if self.serving is not None:
            self.serving.pipeline.drain()

    def require_serving(self) -> Serving:
        """Return what serves.

        Raises:
            NotReadyError: nothing does yet.
        """
        if self.serving is None:
            raise NotReadyError("the server is warming up or measuring its latencies; try again in a moment")
        return self.serving


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


def make_classify(api: Api) -> Handle:
    """Make what answers POST /classify."""

    async def classify(request: Request) -> Response:
        """Classify an image with the best sub-network that budgets, load and machine allow at this moment.

        The image comes as the multipart field `file`, or as the body itself.
        """
        arrived_at = api.clock()
        query = _parse_query(request.scope["query_string"])
        answer = await _classify_while_connected(api, request, _wanted(query, arrived_at, query.top_k))
        described = describe_answer(answer, api.checkpoint)
        stages = described.timing_ms.model_dump()
        timing = ", ".join(f"{stage};dur={ms}" for stage, ms in stages.items())
        # Made here, because FastAPI would validate the whole answer once more.
        return Response(described.model_dump_json(), media_type="application/json", headers={"Server-Timing": timing})

    return classify


def build_router(api: Api, classify: Handle) -> APIRouter:
    """Make the routes over `api`."""
    router = APIRouter()
    config = api.checkpoint.config
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
        pipeline = api.require_serving().pipeline
        return describe_forecast(pipeline.decide(_wanted(query, api.clock())), config)

    @router.get("/subnetworks", responses={503: RESPONSES[503]})
    async def subnetworks() -> SubNetworksAnswer:
        """List every sub-network with its cost, its accuracy and its latency on this machine."""
        return api.require_serving().family

    @router.get("/resources", responses={503: RESPONSES[503]})
    async def resources() -> ResourcesAnswer:
        """Tell what the machine looks like, and what the policy makes of it."""
        serving, now = api.require_serving(), api.clock()
        situation = serving.line.situation(now)
        try:
            forecast = describe_forecast(serving.pipeline.decide(InferenceRequest(now)), config)
        except ServiceError:
            forecast = None
        snapshot = api.monitor.latest
        return ResourcesAnswer(
            snapshot=asdict(snapshot),
            age_s=round(now - snapshot.taken_at, 3),
            waiting=len(serving.line),
            arrival_rate=round(situation.arrival_rate, 3),
            slowdown=round(situation.slowdown, 3),
            expected_from_others=round(serving.line.prior_slowdown, 3),
            stretch=round(situation.stretch, 3),
            prudence=round(situation.prudence, 3),
            max_batch_size=situation.max_batch_size,
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
        if not api.require_serving().pipeline.is_ready:
            raise NotReadyError("the server is stopping")
        return HealthAnswer(status="ready")

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Give all metrics in the Prometheus text format."""
        api.report()
        return Response(await asyncio.to_thread(api.metrics.page), media_type=CONTENT_TYPE)  # of many processes, slow

    return router


@lru_cache(QUERIES_KEPT)
def _parse_query(query_string: bytes) -> ClassifyQuery:
    """Read the query parameters.

    Raises:
        RequestValidationError: one is unusable.
    """
    try:
        return ClassifyQuery.model_validate(dict(QueryParams(query_string)))
    except ValidationError as error:
        problems = [{**problem, "loc": ("query", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems) from error


def _wanted(query: DecideQuery, arrived_at: float, top_k: int | None = None) -> InferenceRequest:
    return InferenceRequest(
        arrived_at, query.budget_ms, query.budget_gflops, query.subnetwork, top_k, priority=query.priority
    )


async def _classify_while_connected(api: Api, request: Request, wanted: InferenceRequest) -> Classification:
    """Classify, and stop wherever the request stands once its client is gone: its compute is better spent elsewhere.

    Raises:
        ServiceError: the request is refused, or fails.
    """
    try:
        pipeline = api.require_serving().pipeline
    except NotReadyError as error:
        api.count_refusal(CLASSIFY_PATH, error.code)
        raise
    answering = asyncio.current_task()
    watching: asyncio.Task[None] | None = None
    patience: asyncio.TimerHandle | None = None
    gone = False

    async def watch() -> None:
        nonlocal gone
        await wait_until_gone(request)
        gone = True
        if answering is not None:
            answering.cancel(GONE)

    def start_watching() -> None:
        nonlocal watching
        watching = asyncio.create_task(watch())

    async def read(within_s: float) -> bytes:
        nonlocal patience
        data = await read_image(request, api.max_body_bytes, api.max_upload_s, within_s)  # notices who leaves
        patience = asyncio.get_running_loop().call_later(PATIENCE_S, start_watching)
        return data

    try:
        return await pipeline.classify(read, wanted)
    except asyncio.CancelledError:
        if not gone or answering is None or answering.uncancel():
            raise  # somebody else wants this task to end
        raise ClientGoneError("the client left before its answer") from None
    finally:
        if patience is not None:
            patience.cancel()
        if watching is not None:
            watching.cancel()
