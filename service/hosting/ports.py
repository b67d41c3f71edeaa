"""The ports beside the one of HTTP: kept for this process and its workers, and what serves at the one for operators."""

import asyncio
import ipaddress
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

import uvicorn

from service.hosting.workers import bind, take_address
from service.settings import Settings

PORTS = ("admin_port", "grpc_port")

logger = logging.getLogger(__name__)


@contextmanager
def reserved_ports(settings: Settings) -> Iterator[Settings]:
    """Keep the ports beside the first, where there are to be any.

    Yields:
        The settings, with the numbers of ports that were free.

    Raises:
        CommandError: an address cannot be had.
    """
    with ExitStack() as kept:
        numbers = {}
        for name in PORTS:
            port: int | None = getattr(settings, name)
            if port is not None and settings.fd is None:  # else it is a worker, whose supervisor keeps them
                opened = kept.enter_context(take_address(settings.host, port, is_shared=True))
                numbers[name] = opened.getsockname()[1]
        yield settings.model_copy(update=numbers)


def why_no_changes(settings: Settings) -> str | None:
    """Say why none may ask for another model: where several workers serve, or strangers may reach the port."""
    if settings.workers > 1:
        return "one of several workers is not changed alone: all of them follow the file with --watch-checkpoint"
    # An inherited socket may listen anywhere, and what a proxy hands on comes from anyone.
    is_guarded = _is_loopback(settings.host) and settings.fd is None and settings.forwarded_allow_ips is None
    if settings.admin_port is None and not is_guarded:
        return "others than operators may reach this port: give these a port of their own with --admin-port"
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@asynccontextmanager
async def serving_beside(config: uvicorn.Config, host: str, port: int) -> AsyncIterator[None]:
    """Serve operators as long as the block lasts, in the event loop of another server, whose signals are its own."""
    config.load()
    server, opened = uvicorn.Server(config), bind(host, port, is_shared=True)
    server.lifespan = config.lifespan_class(config)
    await server.startup([opened])
    logger.info("listening for operators on %s port %d", host, port)
    running = asyncio.create_task(server.main_loop())
    try:
        yield
    finally:
        server.should_exit = True
        await running
        await server.shutdown([opened])
