"""Atomic writes: a file is there in full or not at all."""

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def write_atomically(path: Path, content: "ReadableBuffer") -> None:
    """Write a file in place of the one at `path`; a crash, a full disk or a power cut leaves the old one as it was.

    A symbolic link at `path` is replaced, not followed. The file has the permissions of any other new file.

    Raises:
        OSError: the file cannot be written; no partial file is left beside `path`.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # several processes may write the same file
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor is no path
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(partial, path)
    except BaseException:  # KeyboardInterrupt included: the partial file is removed, whatever ends the write
        with suppress(OSError):  # the first error is the one to report
            partial.unlink()
        raise
