from prometheus_client import CollectorRegistry

from service.telemetry.instruments import Instruments
from service.telemetry.samples import samples_by_name, total


def test_samples_are_found_by_name_and_labels() -> None:
    registry = CollectorRegistry()
    instruments = Instruments(registry)
    looks = instruments.counter("supervit_looks", "Looks.", ["first", "second"])
    looks.labels("a", "b").inc(2)
    looks.labels("b", "a").inc()
    instruments.counter("other_looks", "Of another program.").inc()
    samples = samples_by_name(registry)
    assert samples["looks_total"] == {("a", "b"): [2], ("b", "a"): [1]}
    assert "other_looks_total" not in samples
    assert [total(samples, "looks_total", "a", "b"), total(samples, "looks_total", "c", "d")] == [2, 0]


def test_the_gauge_of_each_worker_is_a_value_of_its_own() -> None:
    registry = CollectorRegistry()
    gauge = Instruments(registry).gauge("supervit_load", "Load.", "liveall", ["by", "pid"])
    gauge.labels("own", "1").set(0.25)
    gauge.labels("own", "2").set(0.5)
    samples = samples_by_name(registry)
    assert samples["load"] == {("own",): [0.25, 0.5]}
    assert total(samples, "load", "own") == 0.75
