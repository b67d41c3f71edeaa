"""The first page of a TIFF: its size, and a file of only that page, with the tags that its pixels need."""

import math
import struct

from service.decoding.exif import ORIENTATION
from service.decoding.headers import MAX_BLOCKS, ImageHeader, ends_early
from service.errors import InvalidImageError

_WIDTH, _HEIGHT, _BITS, _SAMPLES, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 258, 277, 322, 323
_LARGE_TILE = 2**20  # pixels; pyramids have such tiles even where a page is smaller
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q", 17: "q"}  # by type
# The tags of TIFF 6.0 and its supplements that say where the pixels are and what they mean.
_NEEDED = {
    *(_WIDTH, _HEIGHT, _BITS, _SAMPLES),
    *(259, 262, 266, 273, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 338, 339, 347, 529, 530, 532),
    ORIENTATION,
}
_LISTS = {273, 279, 324, 325, 347}  # offsets and byte counts of strips and tiles, and JPEG tables
_MAX_VALUES = 4096  # of any other tag; a colour map has 768


def read_tiff(data: bytes) -> ImageHeader:
    """Read the directory of a TIFF's first page.

    Raises:
        InvalidImageError: there is no directory, it has no size, one of its tags has too many values, or its tiles are
            too large.
    """
    order, is_big = "<" if data[:2] == b"II" else ">", data[2:4] in (b"+\0", b"\0+")
    head, number, entry_form, value_bytes = (16, "Q", "HHQ", 8) if is_big else (8, "H", "HHI", 4)
    entry_bytes = struct.calcsize(f"={entry_form}") + value_bytes
    try:
        start: int = struct.unpack_from(order + ("Q" if is_big else "I"), data, head - value_bytes)[0]
        count: int = struct.unpack_from(order + number, data, start)[0]
        entries, values = {}, {}
        first = start + struct.calcsize(f"={number}")
        for position in range(first, first + min(count, MAX_BLOCKS) * entry_bytes, entry_bytes):
            tag, kind, length = struct.unpack_from(order + entry_form, data, position)
            if tag not in _NEEDED or tag in entries:
                continue
            if length > (MAX_BLOCKS if tag in _LISTS else _MAX_VALUES):
                raise InvalidImageError(f"the TIFF's tag {tag} has {length} values, more than an image needs")
            entries[tag] = data[position : position + entry_bytes]
            if kind in _INTEGERS and length == 1:
                values[tag] = struct.unpack_from(order + _INTEGERS[kind], data, position + entry_bytes - value_bytes)[0]
    except (struct.error, OverflowError) as error:
        raise ends_early("the directory of its first page is missing") from error
    width, height = values.get(_WIDTH, 0), values.get(_HEIGHT, 0)
    tile = [values.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_HEIGHT) if tag in entries]
    if min(width, height, *tile) <= 0:
        raise InvalidImageError("the TIFF has no valid size")
    if math.prod(tile) > max(width * height, _LARGE_TILE):
        raise InvalidImageError("the TIFF has tiles far larger than its picture")
    directory = struct.pack(order + number, len(entries)) + b"".join(entries[tag] for tag in sorted(entries))
    padded = data + bytes(-len(data) % 8)
    page = padded[: head - value_bytes] + struct.pack(order + ("Q" if is_big else "I"), len(padded)) + padded[head:]
    # 8 bytes per pixel: libtiff also holds a strip or a tile, which may be the whole picture, or a few megabytes.
    return ImageHeader("TIFF", width, height, page + directory + bytes(value_bytes), 8)
