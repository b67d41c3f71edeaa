"""The FastAPI application over a server's runtime: lifespan, routes, middleware and error responses."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from service.http.admin import build_admin_router
from service.http.classify import DirectRoute, DirectRoutes, Handle, make_classify
from service.http.early_rejection import CLASSIFY_PATH
from service.http.error_responses import ErrorAnswers
from service.http.keys import KeyCheck, describe_keys
from service.http.origins import OriginPolicy
from service.http.pages import add_pages
from service.http.reports import HEADER as TRACE_HEADER
from service.http.reports import RequestReports
from service.http.request_ids import HEADER, RequestIds
from service.http.routes import build_operations_router, build_router
from service.http.torchserve import build_torchserve_router, make_predict, predict_path
from service.http.v1 import build_v1_router, make_v1_predict
from service.http.v2 import build_v2_router, infer_path, make_infer
from service.runtime import ServerRuntime


def create_app(
    runtime: ServerRuntime,
    *,
    ready_first: bool = False,
    sends_request_id: bool = True,
    is_public: bool = False,
    side_services: Sequence[Callable[[], AbstractAsyncContextManager[object]]] = (),
) -> FastAPI:
    """Create the application that serves a runtime.

    Args:
        runtime: not started yet; it runs as long as the app does.
        ready_first: accept requests only once the model can answer them, for use where other servers answer until then.
        sends_request_id: send back an X-Request-ID, for use where no proxy does.
        is_public: leave out what is for operators: metrics, the machine, the page and the documentation.
        side_services: context managers that stay open while the app runs; each serves the same runtime over another
            protocol or at another port.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with runtime.running(ready_first=ready_first), AsyncExitStack() as others:
            for serving in side_services:
                await others.enter_async_context(serving())
            yield

    app = FastAPI(
        title="SuperViT Serve",
        version=version("supervit-serve"),
        lifespan=lifespan,
        openapi_url=None if is_public else "/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    classify = make_classify(runtime.context)
    context, errors = runtime.context, ErrorAnswers(runtime.context.bodies.max_bytes)
    protocol = runtime.inference_protocol
    infer, predict = make_infer(context, protocol), make_predict(context, protocol)

    direct_classify = DirectRoute(CLASSIFY_PATH), classify
    direct_infer = DirectRoute(infer_path("{name}")), infer
    direct_predict = DirectRoute(predict_path("{name}")), predict

    def find_direct(path: str) -> tuple[DirectRoute, Handle] | None:
        if path == CLASSIFY_PATH:
            return direct_classify
        name = context.checkpoint.name
        if path == infer_path(name):
            return direct_infer
        return direct_predict if path == predict_path(name) else None

    app.include_router(build_router(context, classify))
    app.include_router(build_v2_router(context, protocol, infer))
    app.include_router(build_v1_router(protocol, make_v1_predict(context, protocol)))
    app.include_router(build_torchserve_router(protocol, predict))
    if not is_public:
        app.include_router(build_operations_router(context))
        app.include_router(build_admin_router(context, runtime.changer))
        add_pages(app)
    errors.add_to(app)
    app.add_middleware(DirectRoutes, find=find_direct, errors=errors)
    if context.keys is not None:
        describe_keys(app)
        app.add_middleware(KeyCheck, keys=context.keys, metrics=context.metrics)
    app.add_middleware(OriginPolicy, origins=context.cors_origins, hosts=context.allowed_hosts)
    if context.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=context.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[HEADER, TRACE_HEADER, "Server-Timing", "Retry-After"],
        )
    if context.reporter is not None:
        app.add_middleware(RequestReports, reporter=context.reporter)
    app.add_middleware(RequestIds, sends_back=sends_request_id)
    return app
