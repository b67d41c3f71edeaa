"""The `classify` command: asks a server, or the same routes in this process, and shows the answers."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import CliPositionalArg

from models.checkpoint import load_checkpoint
from models.files.checkpoint_errors import MESSAGE_CHARACTERS, shown
from service.app import create_app
from service.engines.profile_store import extended_profile, nominal_latencies
from service.errors import CommandError
from service.errors import first_problem as first_of
from service.runtime import ServerRuntime
from service.settings import Settings

if TYPE_CHECKING:  # imported where it is called: the `supervit` command knows this module, and a server asks no other
    import httpx

REQUEST_TIMEOUT_S = 60
READINESS_POLL_S = 0.01
UNHURRIED_MS = 600_000.0  # nothing else waits in this process


class RefusedError(Exception):
    """The server refused a photo; the message is the server's."""


class Classify(BaseModel):
    """Classify photographs, in this process or by a running server."""

    photos: CliPositionalArg[list[Path]] = Field(description="image files", min_length=1)
    budget_gflops: float | None = Field(None, gt=0, description="most that each may cost, in 1e9 multiply-accumulates")
    top_k: int = Field(5, ge=1, description="predictions to show")
    url: str | None = Field(
        None, min_length=1, description="server to ask, e.g. http://127.0.0.1:8000; this process by default"
    )
    checkpoint: str | None = Field(
        None, description="SuperViT checkpoint to use in this process; by default the one that `serve` would take"
    )
    json_lines: bool = Field(False, description="print the whole answer as a line of JSON per photo")


def classify(command: Classify, transport: "httpx.AsyncBaseTransport | None" = None) -> None:
    """Print the answer for each photo; the same route answers in this process and on a server.

    Args:
        command: what is asked.
        transport: carries requests to a server; the network's by default.

    Raises:
        CommandError: a photo could not be classified, or there is no such server.
    """
    failed = asyncio.run(_classify_all(command, transport))
    if failed:
        raise CommandError(f"{failed} of {len(command.photos)} photos could not be classified")


async def _classify_all(command: Classify, transport: "httpx.AsyncBaseTransport | None") -> int:
    query = {"top_k": command.top_k, "budget_gflops": command.budget_gflops}
    query = {name: value for name, value in query.items() if value is not None}
    failed = 0
    connection = _in_process(command.checkpoint) if command.url is None else _connect(command.url, transport)
    async with connection as client:
        for photo in command.photos:
            try:
                answer = await _ask(client, photo, query)
            except (RefusedError, OSError) as error:
                failed += 1
                print(f"supervit: {_text(photo)}: {_text(getattr(error, 'strerror', None) or error)}", file=sys.stderr)
                continue
            print(json.dumps({"photo": str(photo)} | answer) if command.json_lines else _show(photo, answer))
    return failed


@asynccontextmanager
async def _in_process(checkpoint: str | None) -> "AsyncIterator[httpx.AsyncClient]":
    """Start the service in this process, and yield a client of it once it is ready."""
    import httpx

    given = {"checkpoint": checkpoint} if checkpoint is not None else {}
    settings = make_settings(default_budget_ms=UNHURRIED_MS, **given)
    failed = asyncio.Event()
    served = load_checkpoint(settings.checkpoint)
    latencies = nominal_latencies(extended_profile(served))
    app = create_app(ServerRuntime(settings, served, latencies=latencies, on_failure=failed.set))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(base_url="http://in-process", transport=httpx.ASGITransport(app)) as client,
    ):
        while (await client.get("/health/ready")).status_code != HTTPStatus.OK:
            if failed.is_set():
                raise CommandError("the model cannot run")
            await asyncio.sleep(READINESS_POLL_S)
        yield client


@asynccontextmanager
async def _connect(url: str, transport: "httpx.AsyncBaseTransport | None") -> "AsyncIterator[httpx.AsyncClient]":
    import httpx

    try:
        client = httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S, transport=transport)
    except httpx.InvalidURL as error:
        raise CommandError(f"{url} is no URL: {error}") from error
    async with client:
        yield client


async def _ask(client: "httpx.AsyncClient", photo: Path, query: dict[str, Any]) -> dict[str, Any]:
    import httpx

    data = await asyncio.to_thread(photo.read_bytes)
    try:
        response = await client.post("/classify", params=query, content=data)
        answer: dict[str, Any] = response.json()
        if response.status_code != HTTPStatus.OK:
            raise RefusedError(answer["error"]["message"])
        _show(photo, answer)
    except (httpx.WriteError, httpx.ReadError) as error:  # a server may refuse by closing; the next photo may pass
        raise RefusedError("the server closed the connection, as it does on files larger than it reads") from error
    except (httpx.HTTPError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise CommandError(f"{client.base_url} does not answer as a SuperViT server does: {reason}") from error
    return answer


def make_settings(**given: Any) -> Settings:  # noqa: ANN401 - whatever the fields are
    """Read the environment's settings, and those given.

    Raises:
        CommandError: one is out of its range.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        raise CommandError(f"a SUPERVIT_ variable of the environment: {first_problem(error)}") from error


def _show(photo: Path, answer: dict[str, Any]) -> str:
    """Put an answer on lines; raises a LookupError, TypeError or ValueError where it is none of a SuperViT server's."""
    best = "\n".join(f"  {entry['probability']:6.1%}  {_text(entry['label'])}" for entry in answer["predictions"])
    milliseconds = answer["timing_ms"]["total"]
    return f"{_text(photo)}\n{best}\n  {_text(answer['decision']['reason'])} ({milliseconds:.1f} ms)"


def _text(text: object) -> str:
    """Make what a server or a file's name says fit for a terminal, which obeys control characters."""
    return shown(text, MESSAGE_CHARACTERS)


def first_problem(error: ValidationError) -> str:
    """Say in a line where the first problem is and what it is."""
    where, what = first_of(error.errors())
    return f"{' '.join(where).replace('_', '-')}: {what}"
