"""The gRPC server: its address, its bounds, its health and reflection services, and its shutdown."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service.access.certificates import Certificate
from service.rpc.address_bound import AddressBound
from service.rpc.call_handling import CallHandling
from service.rpc.calls import CallsInFlight
from service.rpc.inference_service import SERVICE_NAME, InferenceService
from service.rpc.tensorflow_service import MODEL_SERVICE, PREDICTION_SERVICE, TensorflowService

logger = logging.getLogger(__name__)

SERVICES = (SERVICE_NAME, PREDICTION_SERVICE, MODEL_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
HEALTH_UPDATE_S = 0.1  # time between two updates of the health service
PING_S, PONG_S = 60, 20  # interval and timeout of keepalive pings, by which a vanished client is noticed
WATCHER_GRACE_S = 1.0  # granted to calls that do not end by themselves, once all requests have their answers


@dataclass(frozen=True, slots=True)
class Bounds:
    """What clients may use.

    Attributes:
        max_message_bytes: size of one message, once it is decompressed.
        max_connections: concurrent connections.
        max_calls_per_connection: concurrent calls of one connection.
        max_calls: concurrent calls in all.
        keep_alive_s: how long a connection without calls is kept, and a stream without requests.
    """

    max_message_bytes: int
    max_connections: int
    max_calls_per_connection: int
    max_calls: int
    keep_alive_s: float

    def options(self) -> list[tuple[str, int]]:
        """Return the bounds as options of a gRPC server."""
        return [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.max_concurrent_streams", self.max_calls_per_connection),
            ("grpc.max_connection_idle_ms", round(1000 * self.keep_alive_s)),
            ("grpc.keepalive_time_ms", 1000 * PING_S),
            ("grpc.keepalive_timeout_ms", 1000 * PONG_S),
            ("grpc.so_reuseport", 1),
        ]


@asynccontextmanager
async def serving(
    answering: CallHandling,
    address: tuple[str, int],
    bounds: Bounds,
    drain_left_s: Callable[[], float],
    certificate: Certificate | None = None,
) -> AsyncIterator[int]:
    """Serve until the block ends, and then until all admitted requests have their answers.

    Args:
        answering: what all services share.
        address: host and port, 0 for any free one; sockets of this process and its sibling workers may share it.
        bounds: what clients may use.
        drain_left_s: returns, at the end, how long requests may still take.
        certificate: certificate for TLS; None for no TLS.

    Yields:
        The port.
    """
    server = grpc.aio.server(
        interceptors=[AddressBound(answering)], options=bounds.options(), maximum_concurrent_rpcs=bounds.max_calls
    )
    inference = InferenceService(answering, bounds.keep_alive_s)
    server.add_generic_rpc_handlers((inference.handler(), *TensorflowService(answering).handlers()))
    readiness = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(readiness, server)
    reflection.enable_server_reflection(SERVICES, server)
    host, port = address
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if certificate is None:
        port = server.add_insecure_port(place)
    else:
        port = server.add_secure_port(place, _credentials(certificate))
    await _tell(readiness, is_ready=answering.protocol.is_ready())
    await server.start()
    logger.info("listening for gRPC on %s port %d", host, port)
    following = asyncio.create_task(_follow(answering.protocol.is_ready, readiness))
    try:
        yield port
    finally:
        await _stop(server, answering.in_flight, drain_left_s())
        following.cancel()


def _credentials(certificate: Certificate) -> grpc.ServerCredentials:
    """Return credentials for TLS that use the certificate as it is when a client connects."""

    def configuration() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([certificate.pem])

    return grpc.dynamic_ssl_server_credentials(configuration(), configuration)


async def _follow(is_ready: Callable[[], bool], readiness: "health.aio.HealthServicer") -> None:
    """Update the health service regularly, until cancelled."""
    while True:
        await _tell(readiness, is_ready=is_ready())
        await asyncio.sleep(HEALTH_UPDATE_S)


async def _tell(readiness: "health.aio.HealthServicer", *, is_ready: bool) -> None:
    status = health_pb2.HealthCheckResponse.SERVING if is_ready else health_pb2.HealthCheckResponse.NOT_SERVING
    for name in (health.OVERALL_HEALTH, SERVICE_NAME):
        await readiness.set(name, status)


async def _stop(server: grpc.aio.Server, in_flight: CallsInFlight, within_s: float) -> None:
    """Refuse new calls and answer the others; streams and health watchers that stay open are not waited for."""
    stopping = asyncio.create_task(server.stop(within_s))
    answered = asyncio.create_task(in_flight.none_left())
    await asyncio.wait((stopping, answered), return_when=asyncio.FIRST_COMPLETED)
    answered.cancel()
    await server.stop(WATCHER_GRACE_S)
    await stopping
