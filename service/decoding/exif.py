"""The orientation out of EXIF, and nothing else: told so, a codec reads millions of fractions."""

import struct

UPRIGHT = 1
ORIENTATION, SHORT = 0x0112, 3
_MAX_ENTRIES = 4096  # cameras write a dozen


def read_orientation(exif: bytes) -> int:
    """Read how a camera was held (Exif 2.3, table 4).

    Args:
        exif: beginning with the byte order, without any prefix.

    Returns:
        1 to 8; 1, upright, where nothing says otherwise or what does is broken.
    """
    kind, values, value = _find(exif) or (SHORT, 1, UPRIGHT)
    return value if (kind, values) == (SHORT, 1) and 1 <= value <= 8 else UPRIGHT


def has_odd_orientation(exif: memoryview) -> bool:
    """Tell whether an orientation is there that is not one number, or may be behind a host of other entries."""
    found = _find(exif)
    return found is not None and found[1] != 1


def _find(exif: bytes | memoryview) -> tuple[int, int, int] | None:
    """Return the type, the number of values, and the first of them, were it a short one."""
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
