"""The head of a request as it arrives: where it may be parsed up to, and what in it the server ignores or refuses."""

import re
from collections.abc import Iterable

MAX_HEAD_BYTES = 32_768
END_OF_HEAD = b"\r\n\r\n"  # and of a chunked body
_END_OF_LINE = b"\r\n"
# The server upgrades to no other protocol, and the parser would take a body for the beginning of one.
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*(?=\r\n|\Z)", re.IGNORECASE)


def end_of_lines(data: bytes, start: int) -> int:
    """Return where the part of a head ends that may be parsed: at the end of the head, or else of its last whole line.

    The line end itself is left to the next part: each part then has whole lines, with the line end before each. Only
    the request line may be parsed in parts, so that what is no HTTP at all is refused at once.
    """
    end = data.find(END_OF_HEAD, start, start + MAX_HEAD_BYTES)
    if end >= 0:
        return end + len(END_OF_HEAD)
    end = min(len(data), start + MAX_HEAD_BYTES)
    if end - start == MAX_HEAD_BYTES:  # too long in any case
        return end
    last = data.rfind(_END_OF_LINE, start, end)
    return last if last >= 0 else end - data.endswith(_END_OF_LINE[:1], start, end)


def without_upgrade(lines: bytes) -> bytes:
    """Return a part of a head without its `Upgrade` lines."""
    return _UPGRADE.sub(b"", lines)


def has_one_host(headers: Iterable[tuple[bytes, bytes]], http_version: str) -> bool:
    """Return whether a request names one host (RFC 9112, section 3.2), as a proxy before the server relies on."""
    hosts = sum(name == b"host" for name, _ in headers)
    return hosts == 1 or (not hosts and http_version == "1.0")
