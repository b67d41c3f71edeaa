"""gRPC beside HTTP: its port, which workers share, and what serves there; imported only where it is asked for."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec

from service.errors import CommandError
from service.hosting.workers import take_address
from service.runtime import ServerRuntime
from service.settings import Settings

LIBRARIES = ("grpc", "grpc_health", "grpc_reflection")


@contextmanager
def reserved_port(settings: Settings, libraries: Sequence[str] = LIBRARIES) -> Iterator[Settings]:
    """Keep the port for this process and its workers, if there is to be one, for which it takes the libraries.

    Yields:
        The settings, with the number of a port that was free.

    Raises:
        CommandError: the address cannot be had, or the libraries are not installed.
    """
    if settings.grpc_port is None:
        yield settings
        return
    if not all(map(find_spec, libraries)):
        raise CommandError("--grpc-port: gRPC is missing; install this project with its extra, pip install '.[grpc]'")
    if settings.fd is not None:  # a worker, whose supervisor keeps the port
        yield settings
        return
    with take_address(settings.host, settings.grpc_port, is_shared=True) as reserved:
        yield settings.model_copy(update={"grpc_port": reserved.getsockname()[1]})


def grpc_beside(
    settings: Settings, runtime: ServerRuntime, max_connections: int
) -> Callable[[], AbstractAsyncContextManager[object]]:
    """Make what serves gRPC as long as a block lasts, where the settings name a port for it."""
    if settings.grpc_port is None:
        return nullcontext
    from service.rpc.answering import Answering
    from service.rpc.server import Bounds, serving

    answering = Answering(
        runtime.inference_protocol, runtime.metrics, settings.max_upload_s, settings.max_connections_per_address
    )
    bounds = Bounds(
        max_message_bytes=settings.max_body_bytes,
        max_connections=max_connections,
        max_calls=max_connections,
        max_calls_per_connection=settings.max_in_flight_per_address,
        keep_alive_s=settings.keep_alive_s,
    )
    address = settings.host, settings.grpc_port
    return partial(serving, answering, address, bounds, lambda: runtime.drain_left_s)
