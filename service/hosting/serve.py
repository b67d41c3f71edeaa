"""Serves until told to stop: with one server in this process, or with several workers under a supervisor."""

import asyncio
import ipaddress
import logging
import math
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection
from functools import partial
from types import FrameType
from typing import Any

import torch
import uvicorn

from models.checkpoint import load_checkpoint
from models.devices import resolve_device
from models.files.sources import find_checkpoint
from service.access.certificates import Certificate
from service.app import create_app
from service.domain import ServerState
from service.engines.base import Engine
from service.errors import CommandError
from service.hosting.grpc_port import grpc_beside, require_grpc
from service.hosting.interpreter import configure_interpreter, stop_on_hangup
from service.hosting.ports import changes_refused_reason, reserved_ports, serving_beside
from service.hosting.supervisor import Supervisor
from service.hosting.workers import (
    bind_exclusively,
    inherit_socket,
    reserved,
    split_cpus,
    start_worker,
    write_heartbeat,
)
from service.http.connections import Connections, proxy_check
from service.http.early_rejection import EarlyRejection, RejectingProtocol
from service.http.tls import TlsGate
from service.machine.monitor import Monitor
from service.runtime import ServerRuntime
from service.settings import Settings, comma_separated, environment_variable, unknown_variables, worker_environment
from service.telemetry.logs import configure_logging
from service.telemetry.multiprocess import SHARED_FOLDER_VARIABLE
from service.telemetry.rate_limited_log import RateLimitedLog
from service.telemetry.reports import find_tracer

logger = logging.getLogger(__name__)

OTHER_FILES = 1024  # file descriptors of the process itself, and of connections that are about to be refused
LEAST_FREE_FILES = 64
SECURITY_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}  # of every answer


class _Server(uvicorn.Server):
    """Logs where it listens, and takes no new requests from the signal that tells it to stop."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None], *, is_tls: bool, has_page: bool) -> None:
        super().__init__(config)
        self._drain, self._scheme, self._has_page = drain, "https" if is_tls else "http", has_page

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and log the addresses of the sockets: uvicorn logs only addresses that it binds itself."""
        await super().startup(sockets)
        for opened in sockets or ():
            if opened.family == socket.AF_UNIX:
                logger.info("listening on %s", opened.getsockname())
            else:
                host, port, *_ = opened.getsockname()
                logger.info("listening on %s://%s:%d", self._scheme, f"[{host}]" if ":" in host else host, port)
                if self._has_page:
                    logger.info("web page at %s", _page_url(self._scheme, host, port))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, and stop as uvicorn does."""
        self._drain()
        super().handle_exit(sig, frame)


def _page_url(scheme: str, host: str, port: int) -> str:
    """Return the page's URL for a browser on this machine, which cannot open the address for every interface."""
    if ipaddress.ip_address(host).is_unspecified:
        host = "localhost"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/"


def supervise(settings: Settings, cpus: Collection[int], cores: float) -> None:
    """Serve with several workers until SIGTERM or Ctrl-C.

    Args:
        settings: of the server as a whole.
        cpus: numbers of the available CPUs.
        cores: how many of them may be kept busy: fewer under a quota.

    Raises:
        CommandError: there are more workers than cores, the address is not available, or no worker can run.
    """
    shares, settings = plan_workers(settings, cpus, cores)
    load_checkpoint(settings.checkpoint)  # here, so that what is wrong with it is reported once
    if environment_variable(SHARED_FOLDER_VARIABLE) is not None:
        logger.warning("%s is ignored: workers use a new temporary folder", SHARED_FOLDER_VARIABLE)
    with reserved(settings.host, settings.port) as address:
        command = [sys.executable, "-P", "-m", "service.cli", "serve", "--fd"]  # -P: no imports from the current folder
        start = partial(start_worker, command, worker_environment(settings), address)
        supervisor = Supervisor(start, shares, settings.drain_s)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, supervisor.stop)
        stop_on_hangup(supervisor.stop)
        logger.info("%d workers share %s port %d", settings.workers, *address.getsockname()[:2])
        if not supervisor.run():
            raise CommandError("the workers cannot run; see the log")
    if supervisor.stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if supervisor.stopped_by is not None:  # end by the signal, as its sender expects and as a single server does
        signal.signal(supervisor.stopped_by, signal.SIG_DFL)
        signal.raise_signal(supervisor.stopped_by)


def plan_workers(settings: Settings, cpus: Collection[int], cores: float) -> tuple[list[set[int]], Settings]:
    """Divide the CPUs among the workers, and make the settings of each worker.

    Raises:
        CommandError: there are more workers than cores.
    """
    try:
        shares = split_cpus(cpus, cores, settings.workers)
    except ValueError as error:
        raise CommandError(str(error)) from error
    # Workers get the path: replacements serve the same weights, even if the name means another file by then.
    settings = settings.model_copy(update={"checkpoint": str(find_checkpoint(settings.checkpoint))})
    is_on_cpu = resolve_device(settings.device).type == "cpu"
    return shares, divide_limits(settings, cores, is_quota=cores < len(cpus), is_on_cpu=is_on_cpu)


def divide_limits(settings: Settings, cores: float, *, is_quota: bool, is_on_cpu: bool) -> Settings:
    """Give each worker its share of what every worker sees as a whole: a quota of CPU time, or a GPU."""
    parts: dict[str, float] = {}
    if is_quota and settings.threads is None:
        parts["threads"] = max(1, int(cores / settings.workers))
    if settings.max_utilization is not None and (is_quota or not is_on_cpu):
        parts["max_utilization"] = settings.max_utilization / settings.workers
    return settings.model_copy(update=parts)


def allow_connections(
    max_connections: int,
    limits: tuple[int, int] | None = None,
    set_limits: Callable[[int, tuple[int, int]], None] = resource.setrlimit,
) -> int:
    """Raise the limit on open files as far as needed and allowed: every connection is one, and 1024 are soon used up.

    Args:
        max_connections: connections at once that are wanted.
        limits: the soft and the hard limit; those of this process by default.
        set_limits: sets both limits.

    Returns:
        The number of connections that the limit leaves room for.
    """
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < wanted:
        max_connections = max(1, hard - min(OTHER_FILES, hard // 2))
        logger.warning("%d open files allow only %d connections; raise the limit with ulimit -n", hard, max_connections)
        wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        set_limits(resource.RLIMIT_NOFILE, (wanted, hard))
    return max_connections


def serve(settings: Settings, engine: Engine | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; admitted requests are answered before the server ends.

    Args:
        settings: all of them.
        engine: the engine of a server in this process; by default the one that the settings name.

    Raises:
        CommandError: the address is not available, or the model cannot run.
    """
    configure_logging(settings.log_level, settings.log_format)
    require_grpc(settings)
    with reserved_ports(settings) as settings:
        if settings.workers > 1 and settings.fd is None:
            supervise(settings, os.sched_getaffinity(0), Monitor().latest.cores)
        else:
            _serve_here(settings, engine)


def _serve_here(settings: Settings, engine: Engine | None) -> None:
    failed = threading.Event()

    def stop() -> None:
        failed.set()
        server.should_exit = True

    def tell_supervisor(is_serving: bool) -> None:
        if settings.fd is not None and shared_folder is not None:
            write_heartbeat(shared_folder, is_serving)

    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # or clients could write a line per broken form
    shared_folder = environment_variable(SHARED_FOLDER_VARIABLE)
    if settings.workers > 1 and shared_folder is None:
        raise CommandError("--workers and --fd exclude each other; leave out one of them")
    certificate = None
    if settings.tls_certificate is not None and settings.tls_key is not None:
        certificate = Certificate(settings.tls_certificate, settings.tls_key)
    ports = 1 if settings.grpc_port is None else 2
    max_connections = allow_connections(ports * settings.max_connections) // ports
    host, port, inherited = settings.host, settings.port, settings.fd
    with bind_exclusively(host, port) if inherited is None else inherit_socket(inherited) as opened:
        # The weights are read in less time than threads need to synchronise, on a busy machine in far less. The engine
        # sets the number of threads that it computes with.
        torch.set_num_threads(1)
        runtime = ServerRuntime(
            settings,
            load_checkpoint(settings.checkpoint),  # not kept here: another may replace it later
            engine,
            on_failure=stop,
            heartbeat=tell_supervisor,
            changes_refused=changes_refused_reason(settings),
            tracer=find_tracer(os.environ),
        )
        shared = _shared(settings, max_connections, runtime)
        http: Callable[..., asyncio.Protocol] = partial(RejectingProtocol, **shared)
        if certificate is not None:
            http = partial(TlsGate, protocol=http, context=certificate.context, connections=shared["connections"])
        side_services = [grpc_beside(settings, runtime, max_connections, certificate)]
        if settings.admin_port is not None:
            admin = _configure(settings, create_app(runtime), http)
            admin.lifespan = "off"  # the other app runs the lifespan of the runtime
            side_services.append(partial(serving_beside, admin, settings.host, settings.admin_port))
        if certificate is not None:
            side_services.append(certificate.refreshed)
        # Other workers may serve at the same address: this one takes no connection away from them before it is ready.
        app = create_app(
            runtime,
            ready_first=settings.fd is not None,
            is_public=settings.admin_port is not None,
            side_services=side_services,
        )
        for name in unknown_variables():
            logger.warning("unknown environment variable %s", name)
        config = _configure(settings, app, http)
        server = _Server(config, runtime.drain, is_tls=certificate is not None, has_page=settings.admin_port is None)
        configure_interpreter()
        stop_on_hangup(server.handle_exit)
        try:
            server.run([opened])
        except SystemExit as error:  # a port of its own is not available, as the log says
            raise CommandError("the server cannot start; see the log") from error
        finally:
            if runtime.state is ServerState.HUNG:  # the interpreter would wait for the hung thread
                logging.shutdown()
                os._exit(1)
    if failed.is_set():
        raise CommandError("the model cannot run; see the log")


def _configure(settings: Settings, app: Callable[..., Any], http: Callable[..., asyncio.Protocol]) -> uvicorn.Config:
    """Make uvicorn's configuration for an app."""
    return uvicorn.Config(
        app,
        http=http,  # type: ignore[arg-type] # uvicorn only calls it
        ws="none",
        log_config=None,
        log_level=settings.log_level,
        access_log=False,  # --log-requests says more
        server_header=False,
        headers=list(SECURITY_HEADERS.items()),
        timeout_keep_alive=settings.keep_alive_s,
        proxy_headers=settings.forwarded_allow_ips is not None,
        forwarded_allow_ips=settings.forwarded_allow_ips or [],
        timeout_graceful_shutdown=math.ceil(settings.drain_s),
    )


def _shared(settings: Settings, max_connections: int, runtime: ServerRuntime) -> dict[str, Any]:
    """Make the objects that all connections share."""
    metrics = runtime.metrics.connections
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = Connections(
        max_connections,
        settings.max_connections_per_address,
        None if soft == resource.RLIM_INFINITY else soft - LEAST_FREE_FILES,
        is_proxy=proxy_check(comma_separated(settings.forwarded_allow_ips) or ()),
        observe=metrics.closed,
        observe_number=metrics.opened,
    )
    return {
        "connections": connections,
        "observe": metrics.closed,
        "log": RateLimitedLog(logging.getLogger("service.http")),
        "early": EarlyRejection(runtime.context),
    }
