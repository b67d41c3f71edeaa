"""Reads the server's metrics back from a registry."""

from prometheus_client import CollectorRegistry

PREFIX = "supervit_"
PID = "pid"  # label by which prometheus_client tells the gauges of several workers apart

# The values of each metric by its labels; there are several of a gauge that every worker reports for itself.
Samples = dict[str, dict[tuple[str, ...], list[float]]]


def samples_by_name(registry: CollectorRegistry) -> Samples:
    """Read the metrics, by their name without the prefix."""
    samples: Samples = {}
    for family in registry.collect():
        if family.name.startswith(PREFIX):
            for sample in family.samples:
                labels = tuple(value for name, value in sample.labels.items() if name != PID)
                samples.setdefault(sample.name.removeprefix(PREFIX), {}).setdefault(labels, []).append(sample.value)
    return samples


def total(samples: Samples, name: str, *labels: str) -> float:
    """Return the value of a metric, summed over the workers; 0 if there is none."""
    return sum(samples.get(name, {}).get(labels, ()))
