"""Errors about checkpoints, and the display of untrusted text from files in their messages."""

from collections.abc import Iterator
from contextlib import contextmanager

NAME_CHARACTERS, PATH_CHARACTERS, MESSAGE_CHARACTERS = 80, 300, 1000


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message names it and says in one line what is wrong with it."""


class UnreadableCheckpointError(CheckpointError):
    """The file is missing, truncated, or no checkpoint at all."""


class CheckpointMismatchError(CheckpointError):
    """The file holds weights, but not those of the model that it claims to be."""


def printable_text(text: object, at_most: int = NAME_CHARACTERS) -> str:
    """Make untrusted text printable: control characters are escaped, and at most `at_most` characters are kept.

    Args:
        text: a name from a file, or a path.
        at_most: limit in characters; the middle of a longer text is left out.
    """
    printable = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in str(text)
    )
    if len(printable) <= at_most:
        return printable
    return f"{printable[: at_most // 2]}…{printable[len(printable) + 1 - (at_most + 1) // 2 :]}"


@contextmanager
def prefixed_errors(name: object) -> Iterator[None]:
    """Prefix the messages of checkpoint errors in a block with the name of the checkpoint."""
    try:
        yield
    except CheckpointError as error:
        message = printable_text(error, MESSAGE_CHARACTERS)
        raise type(error)(f"{printable_text(name, PATH_CHARACTERS) or repr('')}: {message}") from error
