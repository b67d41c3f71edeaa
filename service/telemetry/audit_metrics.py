"""What is found out about the answers beside what is promised of them: by themselves, by audits and by clients."""

from prometheus_client import CollectorRegistry, Counter

from models.subnetwork import SubNetwork
from service.domain import Classification

LABELS = ["patch_grid", "keep_rate"]


class AuditMetrics:
    """Counts answers, those that were audited or judged by the sub-network that looked first.

    What was promised is summed over the very same answers. Where the accuracy is unmeasured, nothing is.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        """Declare the metrics."""

        def counter(name: str, text: str) -> Counter:
            return Counter(f"supervit_{name}", text, LABELS, registry=registry)

        self._confidence = Counter(
            "supervit_confidence",
            "Calibrated probability, 0..1, that the answers gave themselves, summed.",
            registry=registry,
        )
        self._audits = (
            counter("audits", "Images that were run again at the most accurate sub-network."),
            counter("audit_agreements", "Those of them that got the same answer."),
            counter("audit_promised_agreements", "How many of them must, at least, by the accuracies of the profile."),
        )
        self._feedback = (
            counter("feedback", "Answers of which a client has said what was right."),
            counter("feedback_correct", "Those of them that were."),
            counter("feedback_promised_correct", "How many of them should be, by the accuracies of the profile."),
        )

    def answered(self, answer: Classification) -> None:
        """Count how sure an answer is."""
        self._confidence.inc(answer.looks[-1].confidence)

    def audited(self, subnetwork: SubNetwork, promised: float, *, agrees: bool) -> None:
        """Count an audit of an answer of a sub-network.

        Args:
            subnetwork: whose answer it was.
            promised: probability, 0..1, with which both agree at least.
            agrees: whether they do.
        """
        _count(self._audits, subnetwork, promised, agrees)

    def judged(self, subnetwork: SubNetwork, promised: float, *, is_correct: bool) -> None:
        """Count what a client says of an answer.

        Args:
            subnetwork: that looked first.
            promised: expected accuracy of the answer, 0..1.
            is_correct: whether it was right.
        """
        _count(self._feedback, subnetwork, promised, is_correct)


def _count(counters: tuple[Counter, Counter, Counter], subnetwork: SubNetwork, promised: float, held: bool) -> None:
    # All three, that none begins later than the others: Prometheus counts nothing from before it first sees a series.
    for counter, value in zip(counters, (1.0, float(held), promised), strict=True):
        counter.labels(subnetwork.patch_grid, f"{subnetwork.keep_rate:g}").inc(value)
