"""Receives the spans of a traced server, through a collector where one is installed, and keeps them for a test."""

import gzip
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

PATIENCE_S = 20.0


class Receiver:
    """The received spans, and the resource attributes of their sender."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, object] = {}

    def take(self, request: ExportTraceServiceRequest) -> None:
        for each in request.resource_spans:
            self.resource = attributes(each.resource.attributes)
            self.spans.extend(span for scope in each.scope_spans for span in scope.spans)

    def wait_for(self, is_there: Callable[[Sequence[Span]], bool]) -> None:
        """Wait until the received spans satisfy a condition."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_there(self.spans):
            assert time.monotonic() < deadline, f"only {len(self.spans)} spans were received"
            time.sleep(0.02)

    def by_trace(self) -> dict[str, tuple[Span, list[Span]]]:
        """Return, by trace ID, the span of the request and the spans of its stages in order of time."""
        found: dict[str, list[Span]] = {}
        for span in sorted(self.spans, key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano)):
            found.setdefault(span.trace_id.hex(), []).append(span)
        return {trace: _request_and_stages(spans) for trace, spans in found.items()}


def _request_and_stages(spans: Sequence[Span]) -> tuple[Span, list[Span]]:
    (request,) = (span for span in spans if span.kind == Span.SPAN_KIND_SERVER)
    return request, [span for span in spans if span is not request]


def attributes(pairs: Iterable[KeyValue]) -> dict[str, object]:
    """Convert OTLP attributes to Python values."""
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in pairs}


@contextmanager
def receiving(receiver: Receiver) -> Iterator[str]:
    """Run an endpoint that passes the spans it is sent to the receiver, and yield its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            receiver.take(ExportTraceServiceRequest.FromString(body))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextmanager
def collecting(receiver: Receiver, port: int) -> Iterator[str]:
    """Run a collector, rotel, that forwards spans to the receiver, and yield the collector's URL.

    Where rotel is not installed, since it has no build for every platform, the URL is the receiver's own.
    """
    package = find_spec("rotel")
    with receiving(receiver) as url:
        if package is None or package.origin is None:
            yield url
            return
        command = [
            *(str(Path(package.origin).with_name("rotel-agent")), "start"),
            *("--otlp-http-endpoint", f"127.0.0.1:{port}", "--otlp-grpc-endpoint", "127.0.0.1:0"),
            *("--otlp-exporter-endpoint", url, "--otlp-exporter-protocol", "http", "--batch-timeout", "200ms"),
        ]
        collector = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        try:
            _await_port(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            collector.terminate()
            collector.wait(PATIENCE_S)


def _await_port(port: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            httpx.get(f"http://127.0.0.1:{port}/")
            return
        except httpx.TransportError:
            assert time.monotonic() < deadline, "the collector does not listen"
            time.sleep(0.02)
