"""An ID for every request, shared by its client, the proxies on its way and the log."""

import random
import re

SAFE_ID = re.compile(rb"[!-~]{1,128}")  # IDs that are safe in a log and in a header


def request_id_of(brought: bytes) -> bytes:
    """Return the ID that a request brings if it is safe, or else a new one."""
    # Not uuid4, which asks the operating system for randomness and would release the GIL for that.
    return brought if SAFE_ID.fullmatch(brought) else b"%032x" % random.getrandbits(128)
