"""A server in this process and without a socket, for a command that is given no URL."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from models.checkpoint import load_checkpoint
from service.app import create_app
from service.client import AsyncClient
from service.errors import CommandError
from service.runtime import ServerRuntime
from service.settings import read_settings

UNHURRIED_MS = 600_000.0  # request budget and start-up timeout: nothing else waits in this process


@asynccontextmanager
async def serve_in_process(checkpoint: str | None) -> AsyncIterator[AsyncClient]:
    """Start the service, and yield a client once the service is ready.

    Args:
        checkpoint: the checkpoint to serve; by default that of the environment's settings.

    Raises:
        CommandError: the settings of the environment are unusable, or the model cannot run.
        CheckpointError: there is no such checkpoint.
    """
    settings = read_settings(
        default_budget_ms=UNHURRIED_MS, **({} if checkpoint is None else {"checkpoint": checkpoint})
    )
    # The command is the only client: no key or host name is checked, and the file of the checkpoint is not watched.
    settings = settings.model_copy(update={"keys": None, "allowed_hosts": None, "watch_checkpoint": False})
    failed = threading.Event()
    app = create_app(ServerRuntime(settings, load_checkpoint(settings.checkpoint), on_failure=failed.set))

    async def sleep(seconds: float) -> None:
        if failed.is_set():
            raise CommandError("the model cannot run")
        await asyncio.sleep(seconds)

    async with (
        app.router.lifespan_context(app),
        AsyncClient("http://in-process", transport=httpx.ASGITransport(app), sleep=sleep) as client,
    ):
        await client.wait_until_ready(UNHURRIED_MS / 1000)
        yield client
