import math
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from service.errors import InvalidParameterError
from service.simulation.arrivals import Arrival, SlowdownScript, TraceError, Traffic, gamma, read_trace


def times(**options: object) -> list[float]:
    [(_, arrivals)] = Traffic.model_validate({"rate": (100,), "duration_s": 100} | options).draws(1.0)
    return [arrival.at for arrival in arrivals]


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("cv2", [0.5, 1, 8])
def test_gamma_gaps_have_the_requested_mean_and_spread(cv2: float) -> None:
    instants = gamma(50, cv2, 1000, np.random.default_rng(0))
    gaps = np.diff([0.0, *instants])
    assert gaps.min() >= 0
    assert instants[-1] < 1000
    assert len(instants) == pytest.approx(50_000, rel=0.03)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(cv2, rel=0.1)


@pytest.mark.parametrize(("shape", "cv2"), [("poisson", 1), ("gamma", 8)])
def test_only_gamma_arrivals_are_burstier_than_a_poisson_process(shape: str, cv2: float) -> None:
    gaps = np.diff(times(arrivals=shape, cv2=8, duration_s=300))
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(cv2, rel=0.15)


def test_a_ramp_grows_evenly_to_its_peak() -> None:
    """From 100/s to 300/s over 100 s: the first half averages (100 + 200) / 2, the second half (200 + 300) / 2."""
    instants = times(arrivals="ramp", peak=3)
    assert sum(at < 50 for at in instants) == pytest.approx(7_500, rel=0.03)
    assert sum(at >= 50 for at in instants) == pytest.approx(12_500, rel=0.03)


def test_a_step_comes_at_half_time_and_may_lower_the_rate() -> None:
    instants = times(arrivals="step", peak=0.2)
    assert sum(at < 50 for at in instants) == pytest.approx(5_000, rel=0.05)
    assert sum(at >= 50 for at in instants) == pytest.approx(1_000, rel=0.1)


def test_bursts_come_every_other_interval() -> None:
    instants = times(arrivals="bursts", peak=10, burst_s=5, duration_s=40)
    in_burst = [at for at in instants if int(at / 5) % 2]
    assert len(in_burst) == pytest.approx(20_000, rel=0.05)
    assert len(instants) - len(in_burst) == pytest.approx(2_000, rel=0.1)


def test_the_peak_is_ignored_for_shapes_without_one() -> None:
    assert len(times(arrivals="poisson", peak=3)) == pytest.approx(10_000, rel=0.05)


def test_the_same_seed_gives_the_same_arrivals_and_another_seed_gives_others() -> None:
    assert times(seed=3) == times(seed=3) != times(seed=4)


def test_budgets_and_limits_are_drawn_evenly_and_do_not_change_the_arrival_times() -> None:
    traffic = Traffic(rate=(100,), budget_ms=(50, 100, 500), budget_gflops=(1, 1000))
    [(_, arrivals)] = traffic.draws(1.0)
    assert [arrival.at for arrival in arrivals] == times(duration_s=60)
    budgets = [arrival.budget_s for arrival in arrivals]
    assert {budget: budgets.count(budget) for budget in (0.05, 0.1, 0.5)} == pytest.approx(
        dict.fromkeys((0.05, 0.1, 0.5), len(arrivals) / 3), rel=0.1
    )
    assert {arrival.budget_gflops for arrival in arrivals} == {1, 1000}


def test_priorities_are_drawn_evenly() -> None:
    [(_, arrivals)] = Traffic(rate=(100,), priority=(0, -5)).draws(1.0)
    priorities = [arrival.priority for arrival in arrivals]
    assert set(priorities) == {0, -5}
    assert priorities.count(-5) == pytest.approx(len(arrivals) / 2, rel=0.1)


def test_a_trace_may_consist_of_arrival_times_alone(tmp_path: Path) -> None:
    [(_, arrivals)] = Traffic(trace=written(tmp_path / "trace", "2.5\n0\n1e0\n"), budget_ms=(75,)).draws(80.0)
    assert [(arrival.at, arrival.budget_s) for arrival in arrivals] == [(0, 0.075), (1, 0.075), (2.5, 0.075)]
    with pytest.raises(TraceError, match="line 2"):
        read_trace(written(tmp_path / "trace", "2.5\nthree\n"))


def test_arrivals_have_no_compute_budget_and_normal_priority_by_default() -> None:
    [(_, arrivals)] = Traffic(rate=(10,)).draws(1.0)
    assert {(arrival.budget_s, arrival.budget_gflops, arrival.priority) for arrival in arrivals} == {(0.1, None, 0)}


def test_loads_are_multiples_of_the_capacity_and_rates_are_absolute() -> None:
    assert [rate for rate, _ in Traffic(load=(0.5, 2)).draws(80.0)] == [40, 160]
    assert [rate for rate, _ in Traffic(rate=(7, 9)).draws(80.0)] == [7, 9]
    assert [rate for rate, _ in Traffic().draws(80.0)] == [80]


@pytest.mark.parametrize("names", [("rate", "load"), ("rate", "trace"), ("load", "trace")])
def test_rate_load_and_trace_exclude_each_other(names: tuple[str, str]) -> None:
    given = {"rate": (1,), "load": (1,), "trace": "trace.csv"}
    with pytest.raises(ValidationError, match=f"{' and '.join(names)} are mutually exclusive"):
        Traffic.model_validate({name: given[name] for name in names})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": (1e-6,)}, "no request arrives at 1e-06 per second"),
        ({"rate": (1e6,)}, r"1e\+06 per second are more than 2,000,000 requests in total"),
        ({"rate": (19_000,), "arrivals": "ramp", "peak": 2}, "38000 per second are more than"),
    ],
)
def test_too_few_and_too_many_requests_are_rejected(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        times(**options)


def test_a_trace_is_replayed_in_order_and_missing_values_are_drawn(tmp_path: Path) -> None:
    path = written(
        tmp_path / "trace.csv", "priority,seconds,budget_ms,budget_gflops\n0,2.5,20,1.5\n\n-1,0.5,,\n,4,30,inf\n"
    )
    [(rate, arrivals)] = Traffic(trace=path, budget_ms=(75,)).draws(80.0)
    assert rate == 3 / 4
    assert arrivals == [Arrival(0.5, 0.075, None, -1), Arrival(2.5, 0.02, 1.5, 0), Arrival(4.0, 0.03, None, 0)]


def test_a_trace_needs_only_its_seconds_column_and_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert read_trace(written(tmp_path / "trace.csv", b"\xef\xbb\xbfseconds\r\n0\r\n0\r\n")) == [{"seconds": 0.0}] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"trace\.csv, line 1: columns must be seconds and any of"),
        ("at\n1\n", "line 1: columns must be seconds"),
        ("seconds,budget\n1,2\n", "line 1: columns must be seconds"),
        ("seconds,seconds\n1,2\n", "line 1: columns must be seconds and any of .*, each once"),
        ("seconds\n", "has 0 requests"),
        ("seconds\n1\nsoon\n", "line 3: seconds must be a number from 0, the start, to 10,000,000, not 'soon'"),
        ("seconds\n1\n-1\n", "line 3: seconds must be .* not '-1'"),
        ("seconds\n1700000000\n", "line 2: seconds must be .* not '1700000000'"),
        ("seconds,priority\n,1\n", "line 2: seconds must be .* not ''"),
        ("seconds,budget_ms\n1,0\n", "line 2: budget_ms must be a positive number, not '0'"),
        ("seconds,budget_ms\n1,inf\n", "line 2: budget_ms must be a positive number"),
        ("seconds,budget_gflops\n1,nan\n", "line 2: budget_gflops must be a positive number"),
        ("seconds,priority\n1,0.5\n", "line 2: priority must be an integer, not '0.5'"),
        ("seconds,priority\n1\n", "line 2: the numbers of cells and columns differ"),
        ("seconds\n1,2\n", "line 2: the numbers of cells and columns differ"),
        ('seconds\n"1\n', "is not a CSV file: unexpected end of data"),
        (b"seconds\n\xff\n", "is not a CSV file: .*utf-8"),
    ],
)
def test_an_invalid_trace_is_rejected_with_the_reason(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=message):
        read_trace(written(tmp_path / "trace.csv", text))


def test_a_slowdown_holds_from_its_instant_to_the_next() -> None:
    script = SlowdownScript.parse("5:2.5, 8:1,")
    assert [script.factor(at) for at in (0, 4.99, 5, 7.99, 8, 1e9)] == [1, 1, 2.5, 2.5, 1, 1]
    assert SlowdownScript.parse("").factor(3) == 1
    assert SlowdownScript.parse("0:3").factor(0) == 3


@pytest.mark.parametrize(
    "text", ["5", "5:", ":2", "5:2:1", "five:2", "5:0", "5:-1", "5:inf", "5:nan", "-1:2", "8:2,5:1", "5:1,5:2"]
)
def test_an_invalid_slowdown_script_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"slowdown|seconds:factor"):
        SlowdownScript.parse(text)
    with pytest.raises(ValidationError, match="slowdown"):
        Traffic(slowdown=text)


@pytest.mark.parametrize("options", [{"rate": ()}, {"rate": (0,)}, {"budget_ms": (math.inf,)}, {"cv2": 0}, {"sped": 1}])
def test_unknown_options_and_values_outside_their_range_are_rejected(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Traffic.model_validate(options)
