"""Registry of the policies by name: ours, published ones and simple ones. Knows no settings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from models.subnetwork import SubNetwork
from service.errors import InvalidParameterError
from service.scheduling.baseline_policies import (
    Baseline,
    PeriodicPlan,
    Pick,
    SlackFit,
    fixed,
    max_accuracy,
    max_batch,
    min_cost,
    step_down,
)
from service.scheduling.catalog import VariantCatalog
from service.scheduling.level_policy import choose_level
from service.scheduling.state import Decide
from service.scheduling.variants import Variant


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy by name.

    Attributes:
        name: the name in settings and benchmarks.
        make: builds the policy for a catalog and a largest batch size; each one that is built keeps its own plan.
        rejects_early: whether the scheduler rejects at admission a request that could not be answered in time.
            Published policies drop requests when they choose a batch.
    """

    name: str
    make: Callable[[VariantCatalog, int], Decide]
    rejects_early: bool = False


def _stateless(baseline: Baseline) -> Policy:
    """Register a baseline that remembers nothing, so that all servers may share it."""
    return Policy(baseline.name, lambda _catalog, _size: baseline)


def _stateful(name: str, rule: Callable[[VariantCatalog, int], Pick], *, estimates: bool = False) -> Policy:
    """Register a baseline whose rule is made for a catalog and a largest batch size."""
    return Policy(name, lambda catalog, size: Baseline(name, rule(catalog, size), estimates=estimates))


POLICIES = (
    Policy("level", lambda _catalog, _size: choose_level, rejects_early=True),
    _stateless(Baseline("max-accuracy", max_accuracy)),
    _stateless(Baseline("max-batch", max_batch)),
    _stateful("slackfit", SlackFit),
    _stateful("slackfit-capped", partial(SlackFit, capped=True)),
    _stateful("slackfit-estimate", SlackFit, estimates=True),
    _stateless(Baseline("infaas", min_cost)),
    _stateful("proteus", lambda _catalog, _size: PeriodicPlan()),
    _stateless(Baseline("step-down", step_down, estimates=True)),
    _stateless(Baseline("step-down-drop", step_down, drops_early=True, estimates=True)),
)


def variant_name(variant: Variant) -> str:
    """Name a variant briefly: 14-0.5, or 8-0.5+14-1@0.85 where grid 14 looks again if grid 8 is less than 0.85 sure."""
    second = variant.second_look
    looks = _grid_and_rate(variant.profile.subnetwork)
    return looks if second is None else f"{looks}+{_grid_and_rate(second.profile.subnetwork)}@{second.threshold:.10g}"


def fixed_name(variant: Variant) -> str:
    """Name the policy that always runs a variant, e.g. fixed-14-0.5."""
    return f"fixed-{variant_name(variant)}"


def _grid_and_rate(subnetwork: SubNetwork) -> str:
    return f"{subnetwork.patch_grid}-{subnetwork.keep_rate:.10g}"


def policy_names(catalog: VariantCatalog) -> tuple[str, ...]:
    """Name every policy for this catalog; untrained keep rates can be fixed as well, but are not listed."""
    trained = [one for one in catalog.variants if one.profile.is_trained]
    trained.sort(key=lambda one: (one.second_look is not None, one.profile.subnetwork))
    return (*(policy.name for policy in POLICIES), *map(fixed_name, trained))


def find_policy(name: str, catalog: VariantCatalog) -> Policy:
    """Find a policy for a catalog by its name.

    Raises:
        InvalidParameterError: there is no policy of that name; the message lists those there are.
    """
    for policy in POLICIES:
        if policy.name == name:
            return policy
    for variant in catalog.variants:
        if fixed_name(variant) == name:
            return _stateless(fixed(name, variant))
    message = f"unknown policy {name}; choose from {', '.join(policy_names(catalog))}"
    raise InvalidParameterError(message, parameter="policy")
