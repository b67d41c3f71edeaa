"""Files that are there whole or not at all."""

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def write_atomically(path: Path, content: "ReadableBuffer") -> None:
    """Put a file in place of whatever stands at `path`; a crash, a full disk or a power cut leaves that as it was.

    A link that stands at `path` is replaced, not followed. The file has the permissions of any other new one.

    Raises:
        OSError: it cannot be written; nothing is left beside `path`.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # several processes may write the same file
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor is no path
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(partial, path)
    except BaseException:  # Ctrl-C among them: whatever ends the writing, what is half written must go
        with suppress(OSError):  # the first error is the one to tell of
            partial.unlink()
        raise
