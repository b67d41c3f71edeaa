"""The figures of a run: shares, rates and percentiles of its exchanges."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.bench.generator import Exchange

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Figures:
    """How a server did at one rate. Latencies and lateness are in milliseconds; shares and accuracies are 0..1.

    Attributes:
        rate: planned requests per second.
        sent: number of requests that were sent.
        answered: number of requests that were classified, in time or late.
        attainment: share of those sent that were answered by their deadline.
        goodput_per_s: answers in time per second.
        latency_ms: of all answers, from when the request was due: mean, p50, p90, p99, max; None without answers.
        failures: requests without an answer, by code.
        mix: share of the answers by sub-network, the largest first; empty if the server does not name it.
        mean_gflops: mean cost of an answer, in 1e9 MACs; None if the server does not report it.
        accuracy: share of correct answers among the answers to photographs with a label; None without any.
        effective_accuracy: share of the requests with a label that were answered correctly and in time; likewise.
        late_p99_ms: 99th percentile of how late the generator itself sent a request.
    """

    rate: float
    sent: int
    answered: int
    attainment: float
    goodput_per_s: float
    latency_ms: dict[str, float] | None
    failures: dict[str, int]
    mix: dict[str, float]
    mean_gflops: float | None
    accuracy: float | None
    effective_accuracy: float | None
    late_p99_ms: float

    @classmethod
    def of(cls, rate: float, exchanges: Sequence[Exchange], duration_s: float) -> "Figures":
        """Compute the figures of the exchanges, at least one, of a run of `duration_s`."""
        answers = [each for each in exchanges if each.reply.is_answer]
        in_time = [each for each in answers if each.is_in_time]
        labelled = [each for each in exchanges if each.planned.label is not None]
        names = Counter(each.reply.subnetwork for each in answers if each.reply.subnetwork is not None)
        costs = [each.reply.gflops for each in answers if each.reply.gflops is not None]
        right = [each for each in labelled if each.is_right]
        num_answered = sum(each.reply.is_answer for each in labelled)
        return cls(
            rate=rate,
            sent=len(exchanges),
            answered=len(answers),
            attainment=len(in_time) / len(exchanges),
            goodput_per_s=len(in_time) / duration_s,
            latency_ms=_latency_ms([each.latency_s for each in answers]),
            failures=dict(Counter(each.reply.code for each in exchanges if not each.reply.is_answer).most_common()),
            mix={name: count / names.total() for name, count in names.most_common()},
            mean_gflops=math.fsum(costs) / len(costs) if costs else None,
            accuracy=len(right) / num_answered if num_answered else None,
            effective_accuracy=sum(each.is_in_time for each in right) / len(labelled) if labelled else None,
            late_p99_ms=1000 * float(np.percentile([each.late_s for each in exchanges], 99)),
        )


def _latency_ms(latencies_s: Sequence[float]) -> dict[str, float] | None:
    if not latencies_s:
        return None
    found = {f"p{share}": float(np.percentile(latencies_s, share)) for share in PERCENTILES}
    named = {"mean": math.fsum(latencies_s) / len(latencies_s), **found, "max": max(latencies_s)}
    return {name: 1000 * value for name, value in named.items()}
