"""Metrics of connections, apart from those of the requests on them."""

from prometheus_client import CollectorRegistry, Counter, Gauge

# Why the server refused a connection, or closed one that its client would have kept.
REASONS = ("gave_way", "address", "full", "files", "slow", "unread", "bad_request")


class ConnectionMetrics:
    """Counts connections."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Declare the metrics, and start every count at zero."""
        self._open = Gauge("supervit_connections", "Open connections.", registry=registry, multiprocess_mode="livesum")
        self._closed = Counter(
            "supervit_closed_connections",
            "Connections that the server closed or refused, by reason: gave_way (to a new one), address "
            "(too many from one), full (too many), files (no descriptors left), slow, unread (answers), bad_request.",
            ["reason"],
            registry=registry,
        )
        for reason in REASONS:
            self._closed.labels(reason)

    def opened(self, number: int) -> None:
        """Record the number of open connections."""
        self._open.set(number)

    def closed(self, reason: str) -> None:
        """Count a connection that was closed or refused."""
        self._closed.labels(reason).inc()
