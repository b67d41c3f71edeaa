"""The blocks of a GIF up to its first picture: its size, and the file without comments and other extensions."""

import struct

from service.decoding.headers import MAX_BLOCKS, ImageHeader, ends_early, too_many_blocks
from service.errors import InvalidImageError

_EXTENSION, _PICTURE, _CONTROL = 0x21, 0x2C, 0xF9


def read_gif(data: bytes) -> ImageHeader:
    """Read a GIF's header, up to its first picture.

    Raises:
        InvalidImageError: the GIF is cut off before its picture, has none, or has far too many blocks before it.
    """
    if len(data) < 13:
        raise ends_early("it has no pixels")
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    screen_end = 13 + _palette_bytes(flags)
    position, control, blocks = screen_end, b"", 0
    while position < len(data) and data[position] == _EXTENSION:
        start, position = position, position + 2
        while length := data[position] if position < len(data) else 0:
            position += 1 + length
            blocks += 1
            if blocks > MAX_BLOCKS:
                raise too_many_blocks("GIF")
        position += 1
        blocks += 1
        if data[start + 1 : start + 2] == bytes([_CONTROL]):  # this block names the transparent colour
            control = data[start:position]
    if position + 10 > len(data):
        raise ends_early("it has no pixels")
    if data[position] != _PICTURE:
        raise InvalidImageError("the GIF has no picture")
    left, top, across, down = struct.unpack_from("<4H", data, position + 1)
    picture = data[:screen_end] + control + data[position:]
    return ImageHeader("GIF", max(width, left + across), max(height, top + down), picture, 1)


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 128 else 0
