"""Metrics of looks: runs of a sub-network on an image, of which an unsure one may be followed by another."""

from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter

from service.domain import Classification, Look, LookCode


class LookMetrics:
    """Counts looks, and why no other look followed."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Declare the metrics, and start every count at zero."""
        self._looks = Counter("supervit_looks", "Looks at the images of answered requests.", registry=registry)
        self._again = Counter(
            "supervit_second_looks",
            "Looks that followed an unsure one, by both sub-networks (grid-keep rate).",
            ["first", "second"],
            registry=registry,
        )
        self._agreements = Counter(
            "supervit_second_look_agreements", "Second looks that gave the same answer as the first.", registry=registry
        )
        self._stopped = Counter(
            "supervit_last_looks",
            "Answered requests by the reason why no other look followed: sure, none_better, or prevented by budget, "
            "deadline, overload, failed.",
            ["reason"],
            registry=registry,
        )
        for code in LookCode:
            self._stopped.labels(code.value)

    def answered(self, answer: Classification) -> None:
        """Count the looks of an answer."""
        self._looks.inc(len(answer.looks))
        self._stopped.labels(answer.stopped.value).inc()
        for before, after in pairwise(answer.looks):
            self._again.labels(_name(before), _name(after)).inc()
            if before.answer == after.answer:
                self._agreements.inc()


def _name(look: Look) -> str:
    return f"{look.profile.subnetwork.patch_grid}-{look.profile.subnetwork.keep_rate:g}"
