"""Grants of requests, made by hand: for tests with small catalogs."""

from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork
from service.scheduling.state import RequestConstraints
from service.scheduling.variants import Grant, Variant

MANY = 16  # levels: more than any of the catalogs has


def stand_in(index: int) -> Variant:
    """Return a variant that stands for the one at an index of a catalog."""
    return Variant(index, SubNetworkProfile(SubNetwork(2, 0.5), 1), (), index)


def constraints_for(
    budget_s: float,
    highest_level: int,
    pinned: Variant | None = None,
    over_limit: Variant | None = None,
    min_confidence: float = 0.0,
) -> RequestConstraints:
    """Grant every level up to the highest, and above it that level or `over_limit`; or only the `pinned` variant."""
    if pinned is not None:
        grant = Grant((pinned.index,) * MANY, -1, pinned, is_pinned=True)
    else:
        best = over_limit or stand_in(highest_level)
        above = (best.index,) * (MANY - highest_level - 1)
        grant = Grant((*range(highest_level + 1), *above), highest_level, best)
    return RequestConstraints(budget_s, grant, min_confidence=min_confidence)
