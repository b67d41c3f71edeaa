from dataclasses import replace

import pytest

from service.domain import ReasonCode
from service.scheduling.catalog import VariantCatalog
from service.scheduling.reasons import explain, reason_of
from service.scheduling.state import BatchDecision, Reason, RequestConstraints
from tests.service.granting import constraints_for


def capped(constraints: RequestConstraints, gflops: float) -> RequestConstraints:
    return replace(constraints, max_gflops=gflops)


@pytest.mark.parametrize(
    ("reason", "level", "sentence"),
    [
        (
            Reason(ReasonCode.ALONE, 1),
            2,
            "no other request is waiting: grid 4 at keep rate 1 is the most accurate sub-network",
        ),
        (
            Reason(ReasonCode.DEADLINE, 1, 5.0),
            1,
            "5000 ms left: grid 4 at keep rate 0.5 is the most accurate that answers in time",
        ),
        (
            Reason(ReasonCode.FORECAST, 1, 50.0),
            1,
            "50000 ms left and more requests expected: grid 4 at keep rate 0.5 is the most accurate that answers all "
            "of them in time",
        ),
        (
            Reason(ReasonCode.ALL_IN_TIME, 2, 13.0),
            2,
            "2 waiting: grid 4 at keep rate 1, the most accurate sub-network, answers all of them in time",
        ),
        (
            Reason(ReasonCode.ALL_IN_TIME, 5, 9.0),
            1,
            "5 waiting: grid 4 at keep rate 0.5 is the most accurate that answers all of them in time",
        ),
        (
            Reason(ReasonCode.ALL_IN_TIME, 8, 41.0, safety_factor=1.5),
            1,
            "8 waiting: grid 4 at keep rate 0.5 is the most accurate that answers all of them in time if better ones "
            "take 1.5 times as long (requests were missed recently)",
        ),
        (
            Reason(ReasonCode.SUSTAINED_OVERLOAD, 8),
            0,
            "8 waiting, and arrivals have for seconds exceeded what even grid 2 at keep rate 0.5 can sustain",
        ),
        (
            Reason(ReasonCode.BURST_OVERLOAD, 5),
            0,
            "5 waiting and more expected than can be answered in time: grid 2 at keep rate 0.5 answers the most",
        ),
        (
            Reason(ReasonCode.BASELINE, 5, 0.03, policy="slackfit"),
            0,
            "slackfit: grid 2 at keep rate 0.5, 30 ms left for the most urgent request",
        ),
        (Reason(ReasonCode.PINNED), 3, "grid 2 at keep rate 1 was requested by name"),
        (Reason(ReasonCode.UNSURE, 3), 2, "3 waiting with unsure answers: grid 4 at keep rate 1 looks again"),
        (Reason(ReasonCode.NOTHING_TO_RUN), 0, "no waiting request can be answered in time"),
    ],
)
def test_a_reason_is_explained_in_a_sentence(
    catalog: VariantCatalog, reason: Reason, level: int, sentence: str
) -> None:
    assert explain(reason, catalog, catalog.variants[level]) == sentence


def test_a_gflops_budget_is_explained_with_the_cost_of_the_next_better_variant(catalog: VariantCatalog) -> None:
    reason = Reason(ReasonCode.GFLOPS_BUDGET)
    assert explain(reason, catalog, catalog.variants[1], 0.000122) == (
        "grid 4 at keep rate 0.5 is the most accurate within 0.000122 GFLOPs; "
        "the next better one, grid 4 at keep rate 1, costs 0.0001354"
    )
    assert explain(reason, catalog, catalog.variants[2], 5.0) == (
        "5 GFLOPs allow the most accurate sub-network, grid 4 at keep rate 1"
    )


def test_a_limit_by_the_rate_of_the_key_is_explained_as_such(catalog: VariantCatalog) -> None:
    assert explain(Reason(ReasonCode.KEY_RATE), catalog, catalog.variants[1], 0.000122) == (
        "grid 4 at keep rate 0.5 is the most accurate within the 0.000122 GFLOPs left in the rate of its key; "
        "the next better one, grid 4 at keep rate 1, costs 0.0001354"
    )
    rated = replace(capped(constraints_for(1.0, 1), 0.000122), is_rated=True)
    by_queue = BatchDecision(catalog.variants[1], reason=Reason(ReasonCode.ALL_IN_TIME, 2))
    assert reason_of(rated, catalog.variants[1], by_queue).code is ReasonCode.KEY_RATE
    assert reason_of(rated, catalog.variants[0], by_queue) is by_queue.reason


def test_a_reason_mentions_size_where_accuracy_is_unmeasured(catalog: VariantCatalog) -> None:
    unmeasured, (_, middle, best) = replace(catalog, is_measured=False), catalog.variants[:3]
    assert "is the largest within" in explain(Reason(ReasonCode.GFLOPS_BUDGET), unmeasured, middle, 0.000122)
    alone = explain(Reason(ReasonCode.ALONE, 1), unmeasured, best)
    assert alone == "no other request is waiting: grid 4 at keep rate 1 is the largest sub-network"
    assert "is the largest that answers in time" in explain(Reason(ReasonCode.DEADLINE, 1, 5.0), unmeasured, middle)


def test_the_reason_is_the_constraint_or_the_queue_whichever_decided(
    catalog: VariantCatalog,
) -> None:
    cheapest, middle, best, dominated = catalog.variants[:4]
    by_queue = BatchDecision(middle, reason=Reason(ReasonCode.ALL_IN_TIME, 2))
    pinned = constraints_for(1.0, 0, pinned=dominated)
    assert reason_of(pinned, dominated, by_queue).code is ReasonCode.PINNED
    assert reason_of(constraints_for(1.0, 2), best, by_queue) is by_queue.reason
    assert reason_of(capped(constraints_for(1.0, 1), 0.5), cheapest, by_queue) is by_queue.reason  # below its limit
    assert reason_of(capped(constraints_for(1.0, 1), 0.000122), middle, by_queue).code is ReasonCode.GFLOPS_BUDGET
    between = capped(constraints_for(1.0, 0, over_limit=middle), 0.000122)
    assert reason_of(between, middle, by_queue).code is ReasonCode.GFLOPS_BUDGET
    assert reason_of(between, cheapest, by_queue) is by_queue.reason
