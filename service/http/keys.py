"""The check of API keys: every request but a safe one (SAFE_METHODS) needs one where the server has a key file."""

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.access.key_file import HEADERS, KeyFile
from service.domain import ApiKey
from service.errors import ServiceError
from service.http.error_responses import refuse
from service.http.origins import SAFE_METHODS
from service.telemetry.metrics import Metrics
from service.telemetry.outcomes import counting_failures

KEY = "supervit.key"  # scope key
# OpenAPI security schemes.
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def key_of(scope: Scope) -> ApiKey | None:
    """Return the key of a request; None where none is required."""
    key: ApiKey | None = scope.get(KEY)
    return key


def describe_keys(app: FastAPI) -> None:
    """Add to the OpenAPI description of an app which operations need a key, and how to send it."""
    describe = app.openapi

    def describe_with_keys() -> dict[str, Any]:
        schema = describe()
        schema["components"]["securitySchemes"] = SCHEMES
        for operations in schema["paths"].values():
            for method, operation in operations.items():
                if method.upper() not in SAFE_METHODS:
                    operation["security"] = [{name: []} for name in SCHEMES]  # one of them suffices
        return schema

    app.openapi = describe_with_keys  # type: ignore[method-assign] # FastAPI's way to extend it


class KeyCheck:
    """Middleware that passes requests with a valid key and requests with a safe method."""

    def __init__(self, app: ASGIApp, keys: KeyFile, metrics: Metrics) -> None:
        """Create the middleware; requests without a valid key are counted in `metrics`."""
        self._app, self._keys, self._metrics = app, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its key, or refuse it."""
        if scope["type"] != "http" or scope["method"] in SAFE_METHODS:
            await self._app(scope, receive, send)
            return
        try:
            scope[KEY] = self._find(scope)
        except ServiceError as error:
            response = await refuse(Request(scope, receive), error)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _find(self, scope: Scope) -> ApiKey:
        with counting_failures(self._metrics):
            return self._keys.find({name: value for name, value in scope["headers"] if name in HEADERS})
