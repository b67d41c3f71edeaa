"""gRPC beside HTTP; the modules that serve it are imported only if the settings ask for it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from importlib.util import find_spec

from service.access.certificates import Certificate
from service.errors import CommandError
from service.runtime import ServerRuntime
from service.settings import Settings

LIBRARIES = ("grpc", "grpc_health", "grpc_reflection")


def require_grpc(settings: Settings, libraries: Sequence[str] = LIBRARIES) -> None:
    """Check that the libraries are installed, if the settings ask for gRPC.

    Raises:
        CommandError: a library is not installed.
    """
    if settings.grpc_port is not None and not all(map(find_spec, libraries)):
        raise CommandError("--grpc-port: gRPC is not installed; install it with pip install '.[grpc]'")


def grpc_beside(
    settings: Settings, runtime: ServerRuntime, max_connections: int, certificate: Certificate | None
) -> Callable[[], AbstractAsyncContextManager[object]]:
    """Return a factory of context managers that serve gRPC, or do nothing if the settings name no port for it."""
    if settings.grpc_port is None:
        return nullcontext
    from service.rpc.call_handling import CallHandling
    from service.rpc.server import Bounds, serving

    answering = CallHandling(
        runtime.inference_protocol,
        runtime.metrics,
        settings.max_upload_s,
        settings.max_connections_per_address,
        runtime.coming,
        runtime.context.keys,
        runtime.context.reporter,
    )
    bounds = Bounds(
        max_message_bytes=settings.max_body_bytes,
        max_connections=max_connections,
        max_calls=max_connections,
        max_calls_per_connection=settings.max_in_flight_per_address,
        keep_alive_s=settings.keep_alive_s,
    )
    address = settings.host, settings.grpc_port
    return partial(serving, answering, address, bounds, lambda: runtime.drain_left_s, certificate)
