"""Shell completion of option values. Imports nothing slow: it runs at every press of the completion key."""

from collections.abc import Callable, Iterable
from pathlib import Path

from models.files.sources import SUFFIX, shipped_names

Complete = Callable[[str], list[str]]


def checkpoints(incomplete: str) -> list[str]:
    """Offer the checkpoints that ship and checkpoint files; other files are left to the shell's own completion."""
    folder = Path(incomplete[: incomplete.rfind("/") + 1])
    files = (str(path) for path in sorted(folder.glob(f"*{SUFFIX}")))
    return _beginning(incomplete, [*shipped_names(), *files])


def policies(incomplete: str) -> list[str]:
    """Offer the names of the scheduling policies."""
    from service.scheduling.policies import POLICIES  # imports the dependencies of every policy

    return _beginning(incomplete, [policy.name for policy in POLICIES])


def one_of(values: Iterable[str]) -> Complete:
    """Make a completion that offers the given values."""

    def complete(incomplete: str) -> list[str]:
        return _beginning(incomplete, values)

    return complete


COMPLETIONS: dict[str, Complete] = {"checkpoint": checkpoints, "policy": policies, "compare": policies}


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
