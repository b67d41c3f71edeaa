"""What a shell offers for the values of options. Imports nothing that takes long: it runs at every press of the key."""

from collections.abc import Callable, Iterable
from pathlib import Path

from models.files.sources import SUFFIX, shipped_names

Complete = Callable[[str], list[str]]


def checkpoints(incomplete: str) -> list[str]:
    """Offer the checkpoints that ship and files of checkpoints; for other files, the shell's own way is left."""
    folder = Path(incomplete[: incomplete.rfind("/") + 1])
    files = (str(path) for path in sorted(folder.glob(f"*{SUFFIX}")))
    return _beginning(incomplete, [*shipped_names(), *files])


def policies(incomplete: str) -> list[str]:
    """Offer what can choose sub-networks, by name."""
    from service.scheduling.policies import POLICIES  # with all that they choose by

    return _beginning(incomplete, [policy.name for policy in POLICIES])


def one_of(values: Iterable[str]) -> Complete:
    """Offer the values that there are."""

    def complete(incomplete: str) -> list[str]:
        return _beginning(incomplete, values)

    return complete


COMPLETIONS: dict[str, Complete] = {"checkpoint": checkpoints, "policy": policies, "compare": policies}


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
