"""The latencies of batches of 1, 2, 3 and 4 at level 0 are 20, 30, 40 and 50 ms."""

from dataclasses import replace

import pytest

from service.scheduling.catalog import VariantCatalog
from service.scheduling.latency_model import LatencyModel


def scaled(catalog: VariantCatalog, factor: float, *indices: int) -> VariantCatalog:
    """Return the catalog with the latencies of some variants multiplied by a factor."""
    variants = tuple(
        replace(one, latency_by_batch_s=tuple(factor * seconds for seconds in one.latency_by_batch_s))
        if one.index in indices
        else one
        for one in catalog.variants
    )
    return replace(catalog, variants=variants)


def test_refined_latencies_are_the_cautious_ones(fast_catalog: VariantCatalog) -> None:
    model = LatencyModel(fast_catalog)
    model.refine(scaled(fast_catalog, 2, 0), scaled(fast_catalog, 3, 0))
    assert model.latencies_s[0] == pytest.approx([0.06, 0.09, 0.12, 0.15])
    assert model.latencies_s[1] == pytest.approx([0.04, 0.06, 0.08, 0.10])
    assert model.predict(0, 1, 0.0) == pytest.approx(0.06)


def test_batches_that_take_the_likely_time_show_no_slowdown_and_no_drift(fast_catalog: VariantCatalog) -> None:
    """Against the cautious latencies, the machine would seem faster, and measured variants as well."""
    model = LatencyModel(fast_catalog)
    model.refine(fast_catalog, scaled(fast_catalog, 1.5, 0))
    for now in range(50):
        model.observe(0, 2, 0.03, now, 0.0)
    assert model.slowdown(50.0) == pytest.approx(1)
    assert model.latencies_s[0][1] == pytest.approx(1.5 * 0.03)
    assert model.latencies_s[1][1] == pytest.approx(0.06)


def test_the_drift_of_a_variant_is_reset_when_its_profiled_latency_changes(
    fast_catalog: VariantCatalog,
) -> None:
    model = LatencyModel(fast_catalog)
    for now in range(100):  # level 1 is a tenth faster than its profile, level 0 is not
        model.observe(0, 1, 0.02, now, 0.0)
        model.observe(1, 1, 0.036, now + 0.5, 0.0)
    learned = model.latencies_s[1][0]
    assert learned < 0.0385
    model.refine(scaled(fast_catalog, 1.01, 0), scaled(fast_catalog, 1.01, 0))
    assert model.latencies_s[1][0] == learned
    model.refine(scaled(fast_catalog, 1.2, 1), scaled(fast_catalog, 1.2, 1))
    assert model.latencies_s[1][0] == pytest.approx(1.2 * 0.04)
