"""`supervit key`: a new API key, told once, and its entry for the file of keys."""

import sys

from service.access.key_file import make_key
from service.commands.options import Key


def key(command: Key) -> None:
    """Print the entry, and on stderr the key, which is kept nowhere: the output may go into the file."""
    made = make_key(command.name)
    print(made.entry)
    print(f"the key of {command.name}, which is told once: {made.secret}", file=sys.stderr)
