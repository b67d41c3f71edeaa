"""Metrics of each API key, by its name."""

from prometheus_client import CollectorRegistry, Counter


class KeyMetrics:
    """Counts requests and compute by key; there are no series if the server asks for no keys."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Declare the metrics."""
        self._requests = Counter(
            "supervit_key_requests",
            "Finished requests, by the name of their API key and outcome: ok or an error code.",
            ["key", "outcome"],
            registry=registry,
        )
        self._gflops = Counter(
            "supervit_key_gflops",
            "Compute charged to requests, in 1e9 multiply-accumulates, by the name of their API key.",
            ["key"],
            registry=registry,
        )

    def finished(self, name: str, outcome: str) -> None:
        """Count a finished request."""
        self._requests.labels(name, outcome).inc()

    def spent(self, name: str, gflops: float) -> None:
        """Add the compute that a request was charged."""
        self._gflops.labels(name).inc(gflops)
