"""Reads the orientation from EXIF and nothing else: a codec would read all entries, even millions of fractions."""

import struct

UPRIGHT = 1
ORIENTATION, SHORT = 0x0112, 3
_MAX_ENTRIES = 4096  # most entries that are searched; cameras write a dozen


def read_orientation(exif: bytes) -> int:
    """Read the orientation of the camera (Exif 2.3, table 4).

    Args:
        exif: EXIF from its byte order on, without a prefix.

    Returns:
        1 to 8; 1, upright, where the orientation is missing or invalid.
    """
    kind, values, value = _find(exif) or (SHORT, 1, UPRIGHT)
    return value if (kind, values) == (SHORT, 1) and 1 <= value <= 8 else UPRIGHT


def has_odd_orientation(exif: memoryview) -> bool:
    """Return whether the orientation is not a single number, or there are too many entries to search for it."""
    found = _find(exif)
    return found is not None and found[1] != 1


def _find(exif: bytes | memoryview) -> tuple[int, int, int] | None:
    """Return the type of the orientation, its number of values, and the first value read as a SHORT.

    None if there is no orientation, zeros if there are too many entries to search.
    """
    order = {b"II": "<", b"MM": ">"}.get(bytes(exif[:2]))
    if order is None or len(exif) < 8:
        return None
    start: int = struct.unpack_from(f"{order}I", exif, 4)[0]
    if start + 2 > len(exif):
        return None
    count = struct.unpack_from(f"{order}H", exif, start)[0]
    if count > _MAX_ENTRIES:
        return 0, 0, 0
    for position in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, values, value = struct.unpack_from(f"{order}HHIH", exif, position)
        if tag == ORIENTATION:
            return kind, values, value
    return None
