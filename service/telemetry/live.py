"""Samples of the metrics for the live feed: counts that only grow, and current values."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

from prometheus_client import CollectorRegistry

from service.telemetry.samples import samples_by_name, total


@dataclass(frozen=True, slots=True)
class MetricsSample:
    """The metrics of all workers at one instant.

    Attributes:
        at: Unix time in seconds.
        requests: finished requests by outcome: "ok" or an error code.
        subnetworks: answered requests by the sub-network that ran, as "8@0.5" for grid 8 at keep rate 0.5.
        met, missed: deadlines that were met and missed.
        accuracy_loss: top-1 accuracy, 0..1, by which the most accurate sub-network would have been better, summed.
        spent_gflops, saved_gflops: compute in 1e9 multiply-accumulates.
        queued: requests that wait for the engine.
        in_flight: requests that are being worked on.
        own_cpu, others_cpu: fractions of the usable cores in use, by this server and by others.
        gpu: fraction of time in which the GPUs were busy; None without a GPU.
    """

    at: float
    requests: dict[str, float] = field(default_factory=dict)
    subnetworks: dict[str, float] = field(default_factory=dict)
    met: float = 0.0
    missed: float = 0.0
    accuracy_loss: float = 0.0
    spent_gflops: float = 0.0
    saved_gflops: float = 0.0
    queued: float = 0.0
    in_flight: float = 0.0
    own_cpu: float = 0.0
    others_cpu: float = 0.0
    gpu: float | None = None


def read_sample(registry: CollectorRegistry, clock: Callable[[], float] = time.time) -> MetricsSample:
    """Read a sample from the metrics.

    Args:
        registry: registry that holds the metrics.
        clock: Unix time in seconds.
    """
    samples = samples_by_name(registry)

    def mean(name: str, *labels: str) -> float:
        return fmean(samples.get(name, {}).get(labels) or [0.0])

    gpus = [value for found in samples.get("gpu_utilization_ratio", {}).values() for value in found]
    return MetricsSample(
        at=clock(),
        requests={labels[0]: sum(found) for labels, found in samples.get("requests_total", {}).items()},
        subnetworks={
            "@".join(labels): count
            for labels, found in samples.get("subnetwork_requests_total", {}).items()
            if (count := sum(found))
        },
        met=total(samples, "deadlines_total", "met"),
        missed=total(samples, "deadlines_total", "missed"),
        accuracy_loss=total(samples, "accuracy_loss_total"),
        spent_gflops=total(samples, "spent_gflops_total"),
        saved_gflops=total(samples, "saved_gflops_total"),
        queued=total(samples, "queued_requests"),
        in_flight=total(samples, "requests_in_flight"),
        own_cpu=mean("cpu_utilization_ratio", "own"),
        others_cpu=mean("cpu_utilization_ratio", "others"),
        gpu=fmean(gpus) if gpus else None,
    )
