import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from models.profiles import ProfileTable, SubNetworkProfile
from models.subnetwork import SubNetwork
from service.domain import Classification, Decision, Look, LookCode, ReasonCode, Timing
from service.errors import InvalidParameterError
from service.machine.snapshot import GpuSnapshot, ResourceSnapshot
from service.telemetry.metrics import MISSES, STAGES, Metrics, process_registry
from service.telemetry.multiprocess import forget_dead

SMALL = SubNetworkProfile(SubNetwork(8, 0.55), 500_000_000, 0.7, 0.9)
UNMEASURED = SubNetworkProfile(SubNetwork(8, 0.5), 400_000_000)


class Page:
    """The metrics, and the values on their page."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)

    def read(self, name: str, /, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"supervit_{name}", labels)


@pytest.fixture
def page() -> Page:
    return Page()


def answer(profile: SubNetworkProfile = SMALL, total_s: float = 0.3, budget_s: float = 0.5) -> Classification:
    return Classification(
        predictions=(),
        probabilities=np.ones(1, np.float32),
        looks=(Look(profile, 0, 0.9, 0.1, 5.0),),
        stopped=LookCode.SURE,
        decision=Decision(profile, 4, 0.1, ReasonCode.ALONE, "because"),
        timing=Timing(read_s=0.001, decode_wait_s=0.005, decode_s=0.01, queue_s=0.02, inference_s=0.1, total_s=total_s),
        budget_s=budget_s,
        expected_top1=profile.top1,
        accuracy_loss=None if profile.top1 is None else 0.05,
        saved_gflops=1.5,
    )


def test_a_request_is_in_flight_until_it_ends_and_is_counted_by_its_outcome(page: Page) -> None:
    page.metrics.request_started()
    page.metrics.request_started()
    assert page.read("requests_in_flight") == 2
    page.metrics.request_finished("ok")
    assert page.read("requests_in_flight") == 1
    assert page.read("requests_total", outcome="ok") == 1


@pytest.mark.parametrize(
    ("outcome", "given", "counted"),
    [
        ("overloaded", "shed", "shed"),
        ("overloaded", "full", "full"),
        ("deadline_exceeded", None, "expired"),
        ("not_ready", None, "not_ready"),
    ],
)
def test_a_dropped_request_is_counted_by_its_reason(page: Page, outcome: str, given: str | None, counted: str) -> None:
    page.metrics.request_started()
    page.metrics.request_finished(outcome, given)
    assert page.read("dropped_requests_total", reason=counted) == 1


def test_client_errors_do_not_count_as_dropped_requests(page: Page) -> None:
    page.metrics.request_finished("invalid_image")
    assert page.read("dropped_requests_total", reason="expired") is None
    page.metrics.describe([], "tiny", "1234")
    assert {
        page.read("dropped_requests_total", reason=reason) for reason in ("expired", "not_ready", "no_time", "backlog")
    } == {0}


def test_the_age_of_the_profile_and_the_best_accuracy_are_absent_until_known(page: Page) -> None:
    assert page.read("profile_timestamp_seconds", model="tiny") is None
    page.metrics.profile.began("tiny", datetime(2026, 1, 2, tzinfo=UTC), None)
    assert page.read("profile_timestamp_seconds", model="tiny") == 1767312000
    assert page.read("best_accuracy_ratio", model="tiny") is None
    page.metrics.profile.began("tiny", datetime(2026, 1, 2, tzinfo=UTC), 0.9)
    assert page.read("best_accuracy_ratio", model="tiny") == 0.9


@pytest.mark.parametrize(
    "outcome", ["overloaded", "deadline_exceeded", "out_of_memory", "model_error", "internal_error"]
)
def test_overload_expiry_and_server_errors_count_as_missed_deadlines(page: Page, outcome: str) -> None:
    page.metrics.request_started()
    page.metrics.request_finished(outcome)
    assert page.read("deadlines_total", result="missed") == 1


@pytest.mark.parametrize("outcome", ["invalid_image", "budget_too_small", "client_gone", "not_ready"])
def test_client_errors_and_an_unready_server_do_not_count_as_missed_deadlines(page: Page, outcome: str) -> None:
    page.metrics.request_started()
    page.metrics.request_finished(outcome)
    assert not page.read("deadlines_total", result="missed")


@pytest.mark.parametrize(("total_s", "result"), [(0.5, "met"), (0.500001, "missed")])
def test_an_answer_counts_as_a_met_or_a_missed_deadline(page: Page, total_s: float, result: str) -> None:
    page.metrics.answered(answer(total_s=total_s))
    assert page.read("deadlines_total", result=result) == 1


def test_the_durations_costs_and_accuracies_of_answers_are_summed(page: Page) -> None:
    for _ in range(2):
        page.metrics.answered(answer())
    assert page.read("subnetwork_requests_total", patch_grid="8", keep_rate="0.55") == 2
    assert page.read("spent_gflops_total") == 1.0
    assert page.read("saved_gflops_total") == 3.0
    assert page.read("expected_accuracy_total") == pytest.approx(1.4)
    assert page.read("accuracy_loss_total") == pytest.approx(0.1)
    assert page.read("request_duration_seconds_sum") == pytest.approx(0.6)
    stages = [page.read("stage_duration_seconds_sum", stage=stage) for stage in STAGES]
    assert STAGES == ("decode_wait", "decode", "queue", "inference")
    assert stages == pytest.approx([0.01, 0.02, 0.04, 0.2])


def test_answers_of_unmeasured_sub_networks_add_nothing_to_the_accuracy(page: Page) -> None:
    page.metrics.answered(answer(UNMEASURED))
    assert page.read("expected_accuracy_total") == 0.0
    assert page.read("accuracy_loss_total") == 0.0
    assert page.read("confidence_total") == 0.0
    assert page.read("spent_gflops_total") == 0.4


def test_every_sub_network_and_outcome_counts_from_zero(page: Page, profiles: ProfileTable) -> None:
    page.metrics.describe(list(profiles.by_subnetwork), "tiny", "0123")
    assert page.read("subnetwork_requests_total", patch_grid="2", keep_rate="0.5") == 0.0
    assert all(page.read("requests_total", outcome=outcome) == 0.0 for outcome in ("ok", *MISSES))
    assert [page.read("deadlines_total", result=result) for result in ("met", "missed")] == [0.0, 0.0]
    assert page.read("model_info", name="tiny", version="0123") == 1
    assert page.read("workers") == 1


def test_the_predicted_and_measured_times_of_batches_are_summed(page: Page) -> None:
    page.metrics.batch_ran(4, predicted_s=0.1, inference_s=0.2, taken_s=0.4)
    page.metrics.batch_ran(16, predicted_s=0.4, inference_s=0.3, taken_s=0.6)
    assert page.read("predicted_inference_seconds_total") == pytest.approx(0.5)
    assert page.read("batch_duration_seconds_sum") == pytest.approx(0.5)
    assert page.read("engine_taken_seconds_total") == pytest.approx(1.0)
    assert page.read("batch_size_images_sum") == 20
    assert page.read("batch_size_images_bucket", le="4.0") == 1


def test_utilizations_of_the_machine_are_shown_as_fractions(page: Page) -> None:
    snapshot = ResourceSnapshot(
        taken_at=0.0,
        cores=2.0,  # a quota
        cpus=8,
        own_cpu_utilization=0.5,
        others_cores=4.0,
        cpu_pressure=0.1,
        memory_pressure=0.0,
        gpus=(GpuSnapshot(0, utilization=0.75), GpuSnapshot(1)),
    )
    page.metrics.machine(snapshot, queued=7, slowdown=1.25, safety_factor=1.5)
    assert page.read("cpu_utilization_ratio", by="own") == 0.5
    assert page.read("cpu_utilization_ratio", by="others") == 0.5  # of the CPUs, which the quota does not bound
    assert page.read("pressure_ratio", resource="cpu") == 0.1
    assert page.read("gpu_utilization_ratio", gpu="0") == 0.75
    assert page.read("queued_requests") == 7
    assert page.read("slowdown_ratio") == 1.25
    assert page.read("safety_factor_ratio") == 1.5


def test_a_gauge_without_a_new_value_keeps_its_last(page: Page) -> None:
    page.metrics.machine(
        ResourceSnapshot(0.0, cores=4.0, own_cpu_utilization=0.5), queued=0, slowdown=1.0, safety_factor=1.0
    )
    page.metrics.machine(ResourceSnapshot(1.0, cores=4.0), queued=0, slowdown=1.0, safety_factor=1.0)
    assert page.read("cpu_utilization_ratio", by="own") == 0.5


def test_readiness_is_one_or_zero(page: Page) -> None:
    for is_ready in (True, False):
        page.metrics.ready(is_ready)
        assert page.read("ready") == is_ready


def test_the_page_removes_the_gauges_of_dead_processes(tmp_path: Path) -> None:
    metrics = Metrics(CollectorRegistry(), str(tmp_path))
    dead = tmp_path / f"gauge_livesum_{2**22 + 1}.db"  # above the largest process ID
    dead.touch()
    metrics.page()
    assert not dead.exists()


def test_the_page_is_in_the_text_format_by_default(page: Page) -> None:
    page.metrics.request_finished("not_ready")
    text, media_type = page.metrics.page()
    lines = text.decode().splitlines()
    assert media_type.startswith("text/plain")
    assert 'supervit_requests_total{outcome="not_ready"} 1.0' in lines
    assert "# TYPE supervit_request_duration_seconds histogram" in lines


def test_durations_have_exemplars_in_openmetrics_that_its_own_parser_reads(page: Page) -> None:
    page.metrics.answered(answer(), {"trace_id": "4bf9"})
    page.metrics.answered(answer(total_s=0.4))
    text, media_type = page.metrics.page("application/openmetrics-text;version=nonsense,text/plain;q=0.1")
    assert media_type.startswith("application/openmetrics-text")
    parsed = text_string_to_metric_families(text.decode())  # type: ignore[no-untyped-call] # no annotations
    families = {family.name: family for family in parsed}
    for name in ("supervit_request_duration_seconds", "supervit_stage_duration_seconds"):
        exemplars = [sample.exemplar for sample in families[name].samples if sample.exemplar is not None]
        assert exemplars
        assert all(exemplar.labels == {"trace_id": "4bf9"} for exemplar in exemplars)
    assert "4bf9" not in page.metrics.page()[0].decode()


def test_a_process_registry_has_metrics_of_the_process_and_of_the_server() -> None:
    registry = process_registry()
    Metrics(registry)
    names = {metric.name for metric in registry.collect()}
    assert names >= {"process_cpu_seconds", "python_info", "python_gc_collections", "supervit_requests"}


def test_gauges_of_dead_processes_are_removed_and_their_counters_kept(tmp_path: Path) -> None:
    ours, theirs = os.getpid(), 2**22 + 1  # process IDs are at most 2**22
    for name in ("gauge_livesum", "counter"):
        for pid in (ours, theirs):
            (tmp_path / f"{name}_{pid}.db").touch()
    forget_dead(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        f"gauge_livesum_{ours}.db",
        f"counter_{ours}.db",
        f"counter_{theirs}.db",
    }


def test_the_shared_folder_is_created(tmp_path: Path) -> None:
    Metrics(CollectorRegistry(), str(tmp_path / "made" / "here"))
    assert (tmp_path / "made" / "here").is_dir()


@pytest.mark.parametrize("name", ["", "file/below"])
def test_an_invalid_shared_folder_is_rejected_with_the_name_of_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidParameterError, match="PROMETHEUS_MULTIPROC_DIR"):
        Metrics(CollectorRegistry(), name)


@pytest.mark.parametrize(("outcome", "missed"), [("upload_timeout", 0), ("client_gone", 0), ("deadline_exceeded", 1)])
def test_a_slow_upload_or_a_disconnected_client_does_not_count_as_a_missed_deadline(
    page: Page, outcome: str, missed: int
) -> None:
    page.metrics.request_finished(outcome)
    assert page.read("deadlines_total", result="missed") == missed
    assert page.read("requests_total", outcome=outcome) == 1


def test_the_totals_for_an_autoscaler_equal_the_counters(page: Page) -> None:
    page.metrics.answered(answer())
    page.metrics.batch_ran(1, 0.1, 0.25, 0.5)
    page.metrics.request_finished("overloaded", "full")
    totals = page.metrics.totals()
    assert (totals["met"], totals["missed"], totals["taken_s"]) == (1, 1, 0.5)
    assert totals["decode_s"] == answer().timing.decode_s > 0
    assert totals["spent_gflops"] == page.read("spent_gflops_total") == 0.5
    assert totals["saved_gflops"] == page.read("saved_gflops_total") == 1.5
    assert totals["accuracy_loss"] == page.read("accuracy_loss_total") == 0.05


def test_second_looks_are_counted_by_both_sub_networks_and_by_their_agreement(page: Page) -> None:
    first, second = SubNetworkProfile(SubNetwork(8, 0.5), 1), SubNetworkProfile(SubNetwork(14, 1.0), 2)
    for answers in ((3, 3), (3, 4)):
        looked = tuple(Look(one, each, 0.6, 0.1, 5.0) for one, each in zip((first, second), answers, strict=True))
        page.metrics.answered(replace(answer(), looks=looked))
    page.metrics.answered(replace(answer(), stopped=LookCode.DEADLINE))
    assert page.read("looks_total") == 5
    assert page.read("second_looks_total", first="8-0.5", second="14-1") == 2
    assert page.read("second_look_agreements_total") == 1
    assert page.read("last_looks_total", reason="sure") == 2
    assert page.read("last_looks_total", reason="deadline") == 1
    assert page.read("last_looks_total", reason="overload") == 0


def test_the_cost_of_an_answer_includes_all_its_looks(page: Page) -> None:
    looked = tuple(Look(SMALL, 0, 0.6, 0.1, 5.0) for _ in range(2))
    page.metrics.answered(replace(answer(), looks=looked, expected_top1=0.75))
    assert page.read("spent_gflops_total") == 1.0
    assert page.read("expected_accuracy_total") == 0.75
