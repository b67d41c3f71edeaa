"""The FastAPI application over a server's runtime: lifespan, routes and the answers to errors."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from service.http.classify import DirectRoute, make_classify
from service.http.error_responses import ErrorAnswers
from service.http.origins import OriginPolicy
from service.http.pages import add_pages
from service.http.reports import HEADER as TRACE_HEADER
from service.http.reports import RequestReports
from service.http.request_ids import HEADER, RequestIds
from service.http.routes import CLASSIFY_PATH, build_router
from service.runtime import ServerRuntime


def create_app(runtime: ServerRuntime, *, ready_first: bool = False, names_requests: bool = True) -> FastAPI:
    """Serve what a runtime runs.

    Args:
        runtime: not started yet; it lives as long as the app does.
        ready_first: take no request before the model can answer it, for where others answer meanwhile.
        names_requests: send back an X-Request-ID, for where no proxy does.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with runtime.running(ready_first=ready_first):
            yield

    app = FastAPI(
        title="SuperViT Serve", version=version("supervit-serve"), lifespan=lifespan, docs_url=None, redoc_url=None
    )
    classify = make_classify(runtime.context)
    context, errors = runtime.context, ErrorAnswers(runtime.context.max_body_bytes)
    app.include_router(build_router(context, classify))
    add_pages(app)
    errors.add_to(app)
    app.add_middleware(DirectRoute, path=CLASSIFY_PATH, handle=classify, errors=errors)
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
    app.add_middleware(RequestIds, sends_back=names_requests)
    return app
