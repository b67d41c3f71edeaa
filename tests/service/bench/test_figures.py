import pytest

from service.bench.client_protocols import Reply
from service.bench.figures import Figures
from service.bench.generator import Exchange, Planned
from service.simulation.arrivals import Arrival


def exchange(reply: Reply, latency_s: float, label: str | None = None, late_s: float = 0.0) -> Exchange:
    return Exchange(Planned(Arrival(0.0, 0.1), 0, label), late_s, latency_s, reply)


def test_attainment_and_effective_accuracy_are_shares_of_all_requests_sent() -> None:
    figures = Figures.of(
        40,
        [
            exchange(Reply("ok", "cat", "8-1", 0.06), 0.05, "cat"),
            exchange(Reply("ok", "dog", "8-1", 0.06), 0.05, "cat"),
            exchange(Reply("ok", "cat", "5-0.5", 0.02), 0.2, "cat"),
            exchange(Reply("overloaded"), 0.001, "cat"),
        ],
        duration_s=2,
    )
    assert (figures.rate, figures.sent, figures.answered) == (40, 4, 3)
    assert figures.attainment == 2 / 4
    assert figures.goodput_per_s == 2 / 2
    assert figures.failures == {"overloaded": 1}
    assert figures.mix == {"8-1": pytest.approx(2 / 3), "5-0.5": pytest.approx(1 / 3)}
    assert figures.mean_gflops == pytest.approx(0.14 / 3)
    assert figures.accuracy == pytest.approx(2 / 3)
    assert figures.effective_accuracy == 1 / 4


def test_latencies_include_only_answered_requests() -> None:
    answers = [exchange(Reply("ok"), 0.001 * number) for number in range(101)]
    figures = Figures.of(1, [*answers, exchange(Reply("overloaded"), 9.0)], 1)
    assert figures.latency_ms == pytest.approx({"mean": 50, "p50": 50, "p90": 90, "p99": 99, "max": 100})


def test_figures_that_need_answers_are_empty_without_any() -> None:
    figures = Figures.of(1, [exchange(Reply("connection_failed"), 0.5)], 1)
    assert figures.latency_ms is None
    assert (figures.mean_gflops, figures.accuracy, figures.effective_accuracy, figures.mix) == (None, None, None, {})
    assert figures.failures == {"connection_failed": 1}


def test_accuracy_counts_only_photographs_with_a_label() -> None:
    known, unknown = exchange(Reply("ok", "cat"), 0.05, "cat"), exchange(Reply("ok", "cat"), 0.05, None)
    figures = Figures.of(1, [known, unknown], 1)
    assert (figures.accuracy, figures.effective_accuracy) == (1, 1)


def test_the_lateness_of_the_generator_is_reported() -> None:
    exchanges = [exchange(Reply("ok"), 0.5, late_s=0.001 * number) for number in range(101)]
    assert Figures.of(1, exchanges, 1).late_p99_ms == pytest.approx(99)
