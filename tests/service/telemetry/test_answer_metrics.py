import pytest
from prometheus_client import CollectorRegistry

from models.subnetwork import SubNetwork
from service.telemetry.answer_metrics import AuditMetrics
from service.telemetry.instruments import Instruments
from tests.service.inference_protocol.answers import answer

SMALL, LARGE = SubNetwork(8, 0.5), SubNetwork(14, 1.0)


def read(registry: CollectorRegistry, name: str, subnetwork: SubNetwork) -> float | None:
    labels = {"patch_grid": str(subnetwork.patch_grid), "keep_rate": f"{subnetwork.keep_rate:g}"}
    return registry.get_sample_value(f"supervit_{name}_total", labels)


def test_audits_are_counted_by_sub_network_along_with_the_promised_agreements() -> None:
    registry = CollectorRegistry()
    metrics = AuditMetrics(Instruments(registry))
    for agrees in (True, False, True):
        metrics.audited(SMALL, 0.5, agrees=agrees)
    metrics.audited(LARGE, 0.6, agrees=False)
    names = ("audits", "audit_agreements", "audit_promised_agreements")
    assert [read(registry, name, SMALL) for name in names] == [3, 2, 1.5]
    assert [read(registry, name, LARGE) for name in names] == [1, 0, 0.6]


def test_feedback_is_counted_by_sub_network_along_with_the_promised_correct_answers() -> None:
    registry = CollectorRegistry()
    metrics = AuditMetrics(Instruments(registry))
    for is_correct in (True, False, True):
        metrics.judged(SMALL, 0.75, is_correct=is_correct)
    names = ("feedback", "feedback_correct", "feedback_promised_correct")
    assert [read(registry, name, SMALL) for name in names] == [3, 2, 2.25]
    assert read(registry, "feedback", LARGE) is None


def test_the_confidence_of_answers_is_summed() -> None:
    registry = CollectorRegistry()
    metrics = AuditMetrics(Instruments(registry))
    for _ in range(2):
        metrics.answered(answer(0.1, 0.9))
    assert registry.get_sample_value("supervit_confidence_total") == pytest.approx(2 * 0.9)
