"""Metrics of the quality of answers beside the promised one: their own confidence, audits, and clients' feedback."""

from prometheus_client import CollectorRegistry, Counter

from models.subnetwork import SubNetwork
from service.domain import Classification

LABELS = ["patch_grid", "keep_rate"]


class AuditMetrics:
    """Sums the confidence of answers, and counts audited and judged ones by the sub-network of the first look.

    Promised values are summed over the same answers. Answers whose accuracy is unmeasured are not counted.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        """Declare the metrics."""

        def counter(name: str, text: str) -> Counter:
            return Counter(f"supervit_{name}", text, LABELS, registry=registry)

        self._confidence = Counter(
            "supervit_confidence",
            "Calibrated confidence of the answers, 0..1, summed.",
            registry=registry,
        )
        self._audits = (
            counter("audits", "Images that were run again at the most accurate sub-network."),
            counter("audit_agreements", "Audited images that got the same answer."),
            counter("audit_promised_agreements", "Agreements expected at least, by the accuracies of the profile."),
        )
        self._feedback = (
            counter("feedback", "Answers with feedback from a client."),
            counter("feedback_correct", "Answers with feedback that were correct."),
            counter("feedback_promised_correct", "Expected correct answers by the accuracies of the profile."),
        )

    def answered(self, answer: Classification) -> None:
        """Add the confidence of an answer."""
        self._confidence.inc(answer.looks[-1].confidence)

    def audited(self, subnetwork: SubNetwork, promised: float, *, agrees: bool) -> None:
        """Count an audit, which runs an answered image again at the most accurate sub-network.

        Args:
            subnetwork: the sub-network whose answer was audited.
            promised: least probability, 0..1, with which both answers agree.
            agrees: whether both answers agree.
        """
        _count(self._audits, subnetwork, promised, agrees)

    def judged(self, subnetwork: SubNetwork, promised: float, *, is_correct: bool) -> None:
        """Count a client's feedback on an answer.

        Args:
            subnetwork: the sub-network of the first look.
            promised: expected accuracy of the answer, 0..1.
            is_correct: whether the answer was right.
        """
        _count(self._feedback, subnetwork, promised, is_correct)


def _count(counters: tuple[Counter, Counter, Counter], subnetwork: SubNetwork, promised: float, held: bool) -> None:
    # Create all three series at once: Prometheus ignores increases from before it first scrapes a series.
    for counter, value in zip(counters, (1.0, float(held), promised), strict=True):
        counter.labels(subnetwork.patch_grid, f"{subnetwork.keep_rate:g}").inc(value)
