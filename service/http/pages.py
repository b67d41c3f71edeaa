"""The page at / and the documentation at /docs, served from files of installed packages alone."""

import os
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

WEB = Path(str(files("service") / "web"))
SAMPLES = Path(str(files("models") / "checkpoints" / "photographs"))
DOCUMENTATION = Path(str(files("fastapi_offline") / "static"))
# Our scripts set style properties one by one, which needs no 'unsafe-inline'. Swagger UI writes style attributes.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'{styles}; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY.format(styles="")}
REVALIDATE = "no-cache"  # the browser revalidates each file by its ETag
CACHE_ONE_DAY = "max-age=86400"


class _Files(StaticFiles):
    """The files of a folder, served with the headers of `HEADERS` and a caching policy."""

    def __init__(self, folder: Path, caching: str) -> None:
        super().__init__(directory=folder)
        self._headers = {**HEADERS, "Cache-Control": caching}

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(self._headers)
        return response


def add_pages(app: FastAPI) -> None:
    """Serve the page at /, the documentation at /docs and the files of both under /web."""
    page = {**HEADERS, "Cache-Control": REVALIDATE}
    documentation = {**page, "Content-Security-Policy": POLICY.format(styles=" 'unsafe-inline'")}

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(WEB / "index.html", headers=page)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(WEB / "docs.html", headers=documentation)

    app.mount("/web/samples", _Files(SAMPLES, CACHE_ONE_DAY))
    app.mount("/web/docs", _Files(DOCUMENTATION, CACHE_ONE_DAY))
    app.mount("/web", _Files(WEB, REVALIDATE))
