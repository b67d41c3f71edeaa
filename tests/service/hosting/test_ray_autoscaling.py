from types import SimpleNamespace
from typing import Any

import pytest

from service.hosting.ray_autoscaling import ReplicaPolicy

BUSY = {"requests_per_s": 50.0, "engines_wanted": 1.2}  # one of two equal replicas; 2.4 engines are wanted in all


def context(*reports: dict[str, float], ongoing: float = 0) -> Any:  # noqa: ANN401 - a stand-in for Ray's
    names = {name for report in reports for name in report}
    return SimpleNamespace(
        aggregated_metrics={
            name: {number: report[name] for number, report in enumerate(reports) if name in report} for name in names
        },
        current_num_replicas=max(1, len(reports)),
        total_num_requests=ongoing,
        config=SimpleNamespace(get_target_ongoing_requests=lambda: 10),
    )


def wanted(*reports: dict[str, float], ongoing: float = 0) -> float:
    replicas, state = ReplicaPolicy()(context(*reports, ongoing=ongoing))
    assert state == {}
    return replicas


def test_replicas_are_added_until_the_most_accurate_sub_network_can_answer_all_requests() -> None:
    loses_two_points = BUSY | {"accuracy_loss_per_s": 1.0}
    assert wanted(loses_two_points, loses_two_points) == pytest.approx(2.4 / 0.8)


def test_no_replica_is_added_while_little_accuracy_is_lost() -> None:
    loses_half_a_point = BUSY | {"accuracy_loss_per_s": 0.25}
    assert wanted(loses_half_a_point, loses_half_a_point) == 2


def test_no_replica_is_added_while_the_engines_are_idle() -> None:
    small_budgets = {"requests_per_s": 50.0, "accuracy_loss_per_s": 3.0, "engines_wanted": 0.1}
    assert wanted(small_budgets, small_budgets) == 2


def test_replicas_that_are_not_needed_are_removed() -> None:
    at_ease = {"requests_per_s": 5.0, "accuracy_loss_per_s": 0.0, "engines_wanted": 0.2}
    assert wanted(at_ease, at_ease) == pytest.approx(0.4 / 0.8)


def test_a_loss_counts_proportionally_less_at_low_request_rates() -> None:
    one_lost_in_ten_seconds = {"requests_per_s": 0.1, "accuracy_loss_per_s": 0.1, "engines_wanted": 3.0}
    assert wanted(one_lost_in_ten_seconds) == pytest.approx(3.0 / 0.8)
    hardly_any = {"requests_per_s": 0.005, "accuracy_loss_per_s": 0.005, "engines_wanted": 3.0}
    assert wanted(hardly_any) == 1


def test_many_ongoing_requests_add_replicas_at_once() -> None:
    assert wanted(BUSY, BUSY, ongoing=50) == 5


def test_ongoing_requests_set_the_number_of_replicas_if_there_are_no_reports() -> None:
    assert wanted(ongoing=30) == 3


def test_the_accuracy_and_utilization_thresholds_are_configurable() -> None:
    loses_half_a_point = BUSY | {"accuracy_loss_per_s": 0.25}
    policy = ReplicaPolicy(accuracy_loss_points=0.4, max_utilization=0.6)
    assert policy(context(loses_half_a_point, loses_half_a_point))[0] == pytest.approx(4)
