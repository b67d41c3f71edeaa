"""Metrics of clients, apart from the outcomes of their requests: their connections, and what each API key uses."""

from service.telemetry.instruments import Instruments

# Why the server refused a connection, or closed one that its client would have kept.
REASONS = ("gave_way", "address", "full", "files", "slow", "unread", "bad_request")


class ConnectionMetrics:
    """Counts connections."""

    def __init__(self, instruments: Instruments) -> None:
        """Declare the metrics, and start every count at zero."""
        self._open = instruments.gauge("supervit_connections", "Open connections.", "livesum")
        self._closed = instruments.counter(
            "supervit_closed_connections",
            "Connections that the server closed or refused, by reason: gave_way (to a new one), address "
            "(too many from one), full (too many), files (no descriptors left), slow, unread (answers), bad_request.",
            ["reason"],
        )
        for reason in REASONS:
            self._closed.labels(reason)

    def opened(self, number: int) -> None:
        """Record the number of open connections."""
        self._open.set(number)

    def closed(self, reason: str) -> None:
        """Count a connection that was closed or refused."""
        self._closed.labels(reason).inc()


class KeyMetrics:
    """Counts requests and compute by key; there are no series if the server asks for no keys."""

    def __init__(self, instruments: Instruments) -> None:
        """Declare the metrics."""
        self._requests = instruments.counter(
            "supervit_key_requests",
            "Finished requests, by the name of their API key and outcome: ok or an error code.",
            ["key", "outcome"],
        )
        self._gflops = instruments.counter(
            "supervit_key_gflops",
            "Compute charged to requests, in 1e9 multiply-accumulates, by the name of their API key.",
            ["key"],
        )

    def finished(self, name: str, outcome: str) -> None:
        """Count a finished request."""
        self._requests.labels(name, outcome).inc()

    def spent(self, name: str, gflops: float) -> None:
        """Add the compute that a request was charged."""
        self._gflops.labels(name).inc(gflops)
