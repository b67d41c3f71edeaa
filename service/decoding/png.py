"""The chunks of a PNG: its size, and the file without the chunks that carry no pixels, which may be broken."""

import struct
import zlib

from service.decoding.exif import UPRIGHT, read_orientation
from service.decoding.headers import MAX_BLOCKS, ImageHeader, ends_early, too_many_blocks
from service.errors import InvalidImageError

_SIGNATURE_BYTES = 8
_END = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type


def read_png(data: bytes) -> ImageHeader:
    """Read a PNG's first chunk.

    Raises:
        InvalidImageError: the chunk is cut off or invalid.
    """
    if len(data) < 33:
        raise ends_early("it has no pixels")
    if data[12:16] != b"IHDR":
        raise InvalidImageError("the PNG has no valid size")
    _check(data, 8, 13)
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    if not width or not height or colour not in _CHANNELS:
        raise InvalidImageError("the PNG has no valid size")
    in_memory = (depth == 16 and 2) or 1 if _CHANNELS[colour] == 1 else 4
    return ImageHeader("PNG", width, height, data, in_memory)


def strip_metadata(data: bytes) -> tuple[bytes, int]:
    """Strip a PNG to the chunks that its pixels need, and check them; return the file and its EXIF orientation.

    The checksums of all other chunks are ignored, and so are their contents except for the orientation. Of an
    animation, its first picture is left.

    Raises:
        InvalidImageError: a chunk that carries pixels is broken or cut off, or there are far too many chunks.
    """
    view, position = memoryview(data), _SIGNATURE_BYTES
    parts, orientation = [view[:position]], UPRIGHT
    for _ in range(MAX_BLOCKS):
        if position + 8 > len(data):  # some files have all of their pixels but no IEND
            break
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if kind == b"IEND":
            break
        if kind in (b"IHDR", b"PLTE", b"IDAT"):
            if end > len(data):
                parts.append(view[position:])  # the error says how many of the rows are there
                break
            _check(data, position, length)
            parts.append(view[position:end])
        elif kind == b"tRNS" and end <= len(data) and _is_whole(data, position, length):
            parts.append(view[position:end])
        elif kind == b"eXIf":
            orientation = read_orientation(data[position + 8 : min(end - 4, len(data))])
        position = end
    else:
        raise too_many_blocks("PNG")
    return b"".join([*parts, _END]), orientation


def _check(data: bytes, position: int, length: int) -> None:
    if not _is_whole(data, position, length):
        name = data[position + 4 : position + 8].decode("ascii")
        raise InvalidImageError(f"the PNG is broken: the checksum of its chunk {name} at byte {position} is wrong")


def _is_whole(data: bytes, position: int, length: int) -> bool:
    end = position + 8 + length
    return zlib.crc32(memoryview(data)[position + 4 : end]) == int.from_bytes(data[end : end + 4])
