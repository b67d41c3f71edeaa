"""`supervit key`: makes a new API key, which is shown once, and its entry for the file of keys."""

import sys

from service.access.key_file import make_key
from service.commands.options import Key


def key(command: Key) -> None:
    """Print the entry on stdout, which may go into the file of keys, and on stderr the key, which is stored nowhere."""
    made = make_key(command.name)
    print(made.entry)
    print(f"API key of {command.name}, shown only once: {made.secret}", file=sys.stderr)
