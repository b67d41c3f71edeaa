"""The admin and gRPC ports: reserves them for this process and its workers, and serves operators at the former."""

import asyncio
import ipaddress
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

import uvicorn

from service.hosting.workers import bind, reserved
from service.settings import Settings

PORTS = ("admin_port", "grpc_port")

logger = logging.getLogger(__name__)


@contextmanager
def reserved_ports(settings: Settings) -> Iterator[Settings]:
    """Reserve the admin and gRPC ports that the settings ask for, until the block ends.

    Yields:
        The settings, with the number of a free port in place of 0.

    Raises:
        CommandError: an address is not available.
    """
    with ExitStack() as kept:
        numbers = {}
        for name in PORTS:
            port: int | None = getattr(settings, name)
            if port is not None and settings.fd is None:  # else this is a worker, whose supervisor holds the ports
                opened = kept.enter_context(reserved(settings.host, port))
                numbers[name] = opened.getsockname()[1]
        yield settings.model_copy(update=numbers)


def changes_refused_reason(settings: Settings) -> str | None:
    """Return why the model may not be changed: several workers serve, or others may reach the port; None if it may."""
    if settings.workers > 1:
        return "the model cannot be changed in one of several workers; use --watch-checkpoint to change it in all"
    # An inherited socket may listen on any address, and a proxy forwards requests from anyone.
    is_guarded = _is_loopback(settings.host) and settings.fd is None and settings.forwarded_allow_ips is None
    if settings.admin_port is None and not is_guarded:
        return "clients other than operators may reach this port; serve operators on another one with --admin-port"
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@asynccontextmanager
async def serving_beside(config: uvicorn.Config, host: str, port: int) -> AsyncIterator[None]:
    """Serve operators until the block ends, in the event loop of another server, which keeps handling the signals."""
    config.load()
    server, opened = uvicorn.Server(config), bind(host, port, is_shared=True)
    server.lifespan = config.lifespan_class(config)
    await server.startup([opened])
    logger.info("listening for operators on %s port %d", host, port)
    if not _is_loopback(host):
        logger.warning("any client of port %d can read the metrics and replace the model: keep strangers from it", port)
    running = asyncio.create_task(server.main_loop())
    try:
        yield
    finally:
        server.should_exit = True
        await running
        await server.shutdown([opened])
