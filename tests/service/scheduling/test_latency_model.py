"""The latencies of batches of 1, 2, 3 and 4 at level 0 are 20, 30, 40 and 50 ms."""

from dataclasses import replace

import pytest

from service.scheduling.catalog import VariantCatalog
from service.scheduling.latency_model import LatencyModel


def scaled(catalog: VariantCatalog, factor: float, *indices: int) -> VariantCatalog:
    """Let some variants take longer."""
    variants = tuple(
        replace(one, latency_by_batch_s=tuple(factor * seconds for seconds in one.latency_by_batch_s))
        if one.index in indices
        else one
        for one in catalog.variants
    )
    return replace(catalog, variants=variants)


def test_what_is_planned_with_includes_the_caution(fast_catalog: VariantCatalog) -> None:
    model = LatencyModel(fast_catalog)
    model.refine(scaled(fast_catalog, 2, 0), scaled(fast_catalog, 3, 0))
    assert model.latencies_s[0] == pytest.approx([0.06, 0.09, 0.12, 0.15])
    assert model.latencies_s[1] == pytest.approx([0.04, 0.06, 0.08, 0.10])
    assert model.predict(0, 1, 0.0) == pytest.approx(0.06)


def test_a_batch_that_takes_what_is_likely_shows_no_slowdown_and_no_drift(fast_catalog: VariantCatalog) -> None:
    """Against the caution the machine would seem to be faster, and measured variants would be said to be too."""
    model = LatencyModel(fast_catalog)
    model.refine(fast_catalog, scaled(fast_catalog, 1.5, 0))
    for now in range(50):
        model.observe(0, 2, 0.03, now, 0.0)
    assert model.slowdown(50.0) == pytest.approx(1)
    assert model.latencies_s[0][1] == pytest.approx(1.5 * 0.03)
    assert model.latencies_s[1][1] == pytest.approx(0.06)


def test_what_was_learned_of_a_variant_is_forgotten_with_the_figure_that_it_was_learned_against(
    fast_catalog: VariantCatalog,
) -> None:
    model = LatencyModel(fast_catalog)
    for now in range(100):  # level 1 is a tenth faster than its profile, beside level 0
        model.observe(0, 1, 0.02, now, 0.0)
        model.observe(1, 1, 0.036, now + 0.5, 0.0)
    learned = model.latencies_s[1][0]
    assert learned < 0.0385
    model.refine(scaled(fast_catalog, 1.01, 0), scaled(fast_catalog, 1.01, 0))
    assert model.latencies_s[1][0] == learned
    model.refine(scaled(fast_catalog, 1.2, 1), scaled(fast_catalog, 1.2, 1))
    assert model.latencies_s[1][0] == pytest.approx(1.2 * 0.04)
