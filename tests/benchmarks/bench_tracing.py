"""What tracing costs per request: `python -m tests.benchmarks.bench_tracing`.

The HTTP layers that report on a request run over an app that only counts an answer, with and without a tracer, in
turns. The CPU time of the whole process counts, including the thread that sends spans; another process receives them.
"""

import argparse
import asyncio
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import CollectorRegistry

from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork
from service.domain import Classification, Decision, Look, LookCode, ReasonCode, Timing
from service.hosting.interpreter import configure_interpreter
from service.http.protocol import ARRIVED_AT
from service.http.reports import RequestReports
from service.http.request_ids import RequestIds
from service.telemetry.metrics import Metrics
from service.telemetry.outcomes import counted
from service.telemetry.reports import Reporter
from service.telemetry.tracing import RequestTracer

REQUESTS, AT_ONCE, TURNS = 4_000, 50, 7
PARENT = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
PROFILE = SubNetworkProfile(SubNetwork(12, 0.7), 2_193_389_184, 0.958, 0.99)


def make_app(tracer: RequestTracer | None) -> Any:  # noqa: ANN401 - an ASGI app
    metrics = Metrics(CollectorRegistry())

    async def app(scope: dict[str, Any], _: object, send: Any) -> None:  # noqa: ANN401 - ASGI's
        with counted(metrics) as record:
            record(answered(scope[ARRIVED_AT]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    return RequestIds(app if tracer is None else RequestReports(app, Reporter(tracer)))  # type: ignore[arg-type] # of ASGI


def answered(arrived_at: float) -> Classification:
    return Classification(
        predictions=(),
        probabilities=np.ones(1, np.float32),
        looks=(Look(PROFILE, 0, 0.9, 0.01, arrived_at + 0.005),),
        stopped=LookCode.SURE,
        decision=Decision(PROFILE, 4, 0.01, ReasonCode.ALONE, "because"),
        timing=Timing(0.001, 0.0005, 0.002, 0.0015, 0.01, 0.0151),
        budget_s=1.0,
        expected_top1=0.958,
        accuracy_loss=0.0,
        saved_gflops=0.0,
    )


async def ask(app: Any, headers: list[tuple[bytes, bytes]], times: int) -> float:  # noqa: ANN401 - an ASGI app
    """Send `times` requests; return the seconds of CPU time."""

    async def send(_: object) -> None:
        """Discard the answer."""

    began_s = time.process_time()
    for _ in range(times):
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": "/classify",
            "query_string": b"budget_ms=500",
        }
        scope |= {"headers": headers, ARRIVED_AT: time.monotonic(), "scheme": "http", "http_version": "1.1"}
        await app(scope | {"client": ("127.0.0.1", 1)}, None, send)
    return time.process_time() - began_s


async def compare(traced: Any, plain: Any, headers: list[tuple[bytes, bytes]], flush: Callable[[], object]) -> float:  # noqa: ANN401 - ASGI apps
    """Return the microseconds of CPU time that tracing adds to each of REQUESTS, including the export of spans."""
    added_s = 0.0
    for _ in range(REQUESTS // AT_ONCE):
        added_s += await ask(traced, headers, AT_ONCE)
        added_s -= await ask(plain, headers, AT_ONCE)
    began_s = time.process_time()
    flush()
    return 1e6 * (added_s + time.process_time() - began_s) / REQUESTS


@contextmanager
def receiving() -> Iterator[str]:
    """Run another process that receives spans; yield its URL."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_tracing", "--receive"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1/traces"
        finally:
            process.terminate()


def receive() -> None:
    """Receive spans and discard them."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    configure_interpreter()
    with receiving() as url:
        exporters = [BatchSpanProcessor(OTLPSpanExporter(endpoint=url), max_queue_size=10 * REQUESTS) for _ in range(2)]

        def traced(exporter: BatchSpanProcessor, share: float) -> Any:  # noqa: ANN401 - an ASGI app
            return make_app(RequestTracer([exporter], share=share))

        plain = [(b"host", b"x"), (b"content-type", b"image/jpeg"), (b"content-length", b"12345")]
        few, every = exporters
        off, percent, everything = make_app(None), traced(few, 0.01), traced(every, 1.0)
        ways = {
            "1 % sampled": (percent, plain, few.force_flush),
            "part of a caller's trace, unsampled": (percent, [*plain, (b"traceparent", PARENT)], few.force_flush),
            "all sampled": (everything, plain, every.force_flush),
        }
        took: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(TURNS):
            for way, (app, headers, flush) in ways.items():
                took[way].append(asyncio.run(compare(app, off, headers, flush)))
    print(f"{TURNS} turns of {REQUESTS} requests, on {cpu_name()}; microseconds of CPU time that tracing adds:")
    for way, times in took.items():
        print(f"{way:36s} {statistics.median(times):6.1f} ({min(times):.1f} to {max(times):.1f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--receive", action="store_true", help="only take spans, and say at which port")
    receive() if parser.parse_args().receive else main()
