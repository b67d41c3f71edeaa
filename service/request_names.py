"""A name for every request, by which its client, the proxies on its way and the log mean the same one."""

import random
import re

FIT = re.compile(rb"[!-~]{1,128}")  # what can stand in a log and a header without harm


def name_request(brought: bytes) -> bytes:
    """Return the name that a request brings, or one that is made for it."""
    # Not of uuid4, which asks the system for its randomness and would give the GIL away for that.
    return brought if FIT.fullmatch(brought) else b"%032x" % random.getrandbits(128)
