"""What can be wrong with a checkpoint, and how the texts of strangers are shown in saying so."""

from collections.abc import Iterator
from contextlib import contextmanager

NAME_CHARACTERS, PATH_CHARACTERS, MESSAGE_CHARACTERS = 80, 300, 1000


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message names it and says in one line what is wrong with it."""


class UnreadableCheckpointError(CheckpointError):
    """The file is missing, truncated, or no checkpoint at all."""


class CheckpointMismatchError(CheckpointError):
    """The file holds weights, but not those of the model that it claims to be."""


def shown(text: object, at_most: int = NAME_CHARACTERS) -> str:
    """Make a text that a stranger chose fit to be read: no control characters, and no more than `at_most` characters.

    Args:
        text: a name out of a file, or a path.
        at_most: characters; of a longer text, the middle is left out.
    """
    printable = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in str(text)
    )
    if len(printable) <= at_most:
        return printable
    return f"{printable[: at_most // 2]}…{printable[len(printable) + 1 - (at_most + 1) // 2 :]}"


@contextmanager
def about(name: object) -> Iterator[None]:
    """Have the checkpoint errors of a block begin with what they are about."""
    try:
        yield
    except CheckpointError as error:
        message = shown(error, MESSAGE_CHARACTERS)
        raise type(error)(f"{shown(name, PATH_CHARACTERS) or repr('')}: {message}") from error
