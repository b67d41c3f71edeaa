"""Metrics of answers: their looks, and their quality beside the promised one, by confidence, audits and feedback."""

from itertools import pairwise

from models.subnetwork import SubNetwork
from service.domain import Classification, Look, LookCode
from service.telemetry.instruments import Instruments


class LookMetrics:
    """Counts looks, runs of a sub-network on the image of an answered request, and why no other look followed."""

    def __init__(self, instruments: Instruments) -> None:
        """Declare the metrics, and start every count at zero."""
        self._looks = instruments.counter("supervit_looks", "Looks at the images of answered requests.")
        self._again = instruments.counter(
            "supervit_second_looks",
            "Looks that followed an unsure one, by both sub-networks (grid-keep rate).",
            ["first", "second"],
        )
        self._agreements = instruments.counter(
            "supervit_second_look_agreements", "Second looks that gave the same answer as the first."
        )
        self._stopped = instruments.counter(
            "supervit_last_looks",
            "Answered requests by the reason why no other look followed: sure, none_better, or prevented by budget, "
            "deadline, overload, failed.",
            ["reason"],
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


class AuditMetrics:
    """Sums the confidence of answers, and counts audited and judged ones by the sub-network of the first look.

    Promised values are summed over the same answers. Answers whose accuracy is unmeasured are not counted.
    """

    def __init__(self, instruments: Instruments) -> None:
        """Declare the metrics."""
        self._confidence = instruments.counter(
            "supervit_confidence", "Calibrated confidence of the answers, 0..1, summed."
        )
        self._audits = _Checks(
            instruments,
            ("supervit_audits", "Images that were run again at the most accurate sub-network."),
            ("supervit_audit_agreements", "Audited images that got the same answer."),
            (
                "supervit_audit_promised_agreements",
                "Agreements expected at least, by the accuracies of the profile.",
            ),
        )
        self._feedback = _Checks(
            instruments,
            ("supervit_feedback", "Answers with feedback from a client."),
            ("supervit_feedback_correct", "Answers with feedback that were correct."),
            ("supervit_feedback_promised_correct", "Expected correct answers by the accuracies of the profile."),
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
        self._audits.add(subnetwork, promised, agrees)

    def judged(self, subnetwork: SubNetwork, promised: float, *, is_correct: bool) -> None:
        """Count a client's feedback on an answer.

        Args:
            subnetwork: the sub-network of the first look.
            promised: expected accuracy of the answer, 0..1.
            is_correct: whether the answer was right.
        """
        self._feedback.add(subnetwork, promised, is_correct)


class _Checks:
    """Counters of checked answers, of those that held, and of those expected to hold; each with its name and text."""

    def __init__(self, instruments: Instruments, *declared: tuple[str, str]) -> None:
        labels = ("patch_grid", "keep_rate")
        self._counters = [instruments.counter(name, text, labels) for name, text in declared]

    def add(self, subnetwork: SubNetwork, promised: float, held: bool) -> None:
        # Create all three series at once: Prometheus ignores increases from before it first scrapes a series.
        for counter, value in zip(self._counters, (1.0, float(held), promised), strict=True):
            counter.labels(subnetwork.patch_grid, f"{subnetwork.keep_rate:g}").inc(value)


def _name(look: Look) -> str:
    return f"{look.profile.subnetwork.patch_grid}-{look.profile.subnetwork.keep_rate:g}"
