"""The sizes of the AV1 frames in an AVIF. Its boxes may state others, but the codec decodes the frames as they are.

A frame is at most as large as the sequence header before it says (AV1 Bitstream & Decoding Process, section 5.5).
"""

import struct
from collections.abc import Iterator

from service.decoding.headers import MAX_BLOCKS, too_many_blocks

_CONTAINERS = {b"meta": 4, b"moov": 0, b"trak": 0, b"mdia": 0, b"minf": 0, b"stbl": 0}  # by bytes before their boxes
_CHUNKS = {b"stco": ">I", b"co64": ">Q"}
_SEQUENCE_HEADER, _FRAMES = 1, (3, 6)  # types of OBUs
_FILE, _IDAT = 0, 1  # construction methods of an item: where its offsets count from
_MOST_OBUS = 64  # before a frame; encoders write two or three
_MOST_CHUNKS = 64  # the first picture alone is decoded
_MOST_ITEMS, _MOST_EXTENTS, _MOST_IDATS = 4096, 64, 8
_PREFIX_BYTES = 16_384  # of an item, within which its first frame begins


def frame_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield width and height of every sequence header before a first frame, of items and of the chunks of tracks.

    Raises:
        InvalidImageError: the file has far too many boxes or parts.
    """
    idats, tables = list[int](), list[bytes]()
    for kind, start, end in _boxes(data, 0, len(data)):
        if kind == b"iloc":
            tables.append(data[start:end])
        elif kind == b"idat":
            idats.append(start)
        elif kind in _CHUNKS:
            size = struct.calcsize(_CHUNKS[kind])
            num_chunks = min(_MOST_CHUNKS, (end - start - 8) // size)
            for (offset,) in struct.iter_unpack(_CHUNKS[kind], data[start + 8 : start + 8 + num_chunks * size]):
                yield from _sequences(data[offset : offset + _PREFIX_BYTES])
    if len(idats) > _MOST_IDATS:
        raise too_many_blocks("AVIF")
    for method, extents in (item for table in tables for item in _items(table)):
        for begin in idats if method == _IDAT else (0,):  # whichever of several the codec takes
            yield from _sequences(_joined(data, begin, extents))


def _joined(data: bytes, begin: int, extents: list[tuple[int, int]]) -> bytes:
    """Return the beginning of an item, whose extents are offsets from `begin` and lengths, 0 for all that follows."""
    joined = b""
    for offset, length in extents:
        start = begin + offset
        joined += data[start : start + min(length or _PREFIX_BYTES, _PREFIX_BYTES - len(joined))]
    return joined


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type of each box with the start and the end of its content, boxes in containers included."""
    pending = [(start, end)]
    for _ in range(MAX_BLOCKS):
        while pending and pending[-1][0] + 8 > pending[-1][1]:
            pending.pop()
        if not pending:
            return
        position, limit = pending.pop()
        length, kind, head = int.from_bytes(data[position : position + 4]), data[position + 4 : position + 8], 8
        if length == 1:
            length, head = int.from_bytes(data[position + 8 : position + 16]), 16
        after = limit if length == 0 else min(limit, position + max(length, head))
        pending.append((after, limit))
        yield kind, position + head, after
        if kind in _CONTAINERS:
            pending.append((position + head + _CONTAINERS[kind], after))
    raise too_many_blocks("AVIF")


def _items(table: bytes) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield the construction method and the extents of each item of an `iloc` box (ISO/IEC 14496-12, 8.11.3).

    Raises:
        InvalidImageError: there are far too many items, or one has far too many extents.
    """
    version, sizes = int.from_bytes(table[:1]), int.from_bytes(table[4:6])
    offset_bytes, length_bytes, base_bytes = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
    index_bytes = sizes & 15 if version else 0
    wide = 4 if version == 2 else 2
    position = 6

    def number(count: int) -> int:
        nonlocal position
        position += count
        return int.from_bytes(table[position - count : position])

    count = number(wide)
    if count > _MOST_ITEMS:
        raise too_many_blocks("AVIF")
    for _ in range(count):
        number(wide)
        method = number(2) & 15 if version else _FILE
        number(2)
        base, num_extents, extents = number(base_bytes), number(2), []
        if num_extents > _MOST_EXTENTS:
            raise too_many_blocks("AVIF")
        for _ in range(num_extents):
            number(index_bytes)
            extents.append((base + number(offset_bytes), number(length_bytes)))
        yield method, extents


def _sequences(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the size in each sequence header of an item, until a frame or what is no OBU.

    Raises:
        InvalidImageError: there are far too many or too long OBUs before a frame.
    """
    start = 0
    for _ in range(_MOST_OBUS):
        if start >= len(data) and len(data) < _PREFIX_BYTES:
            return
        if start >= len(data):
            break
        header = data[start]
        kind, has_extension, has_size = header >> 3 & 15, header >> 2 & 1, header >> 1 & 1
        start += 1 + has_extension
        if header >> 7 or kind in _FRAMES or not (has_size or kind == _SEQUENCE_HEADER):
            return
        length, start = _leb128(data, start) if has_size else (len(data) - start, start)
        if kind == _SEQUENCE_HEADER:
            yield _size_in_sequence(data[start : start + min(length, 64)])
        start += length
    raise too_many_blocks("AVIF")


def _leb128(data: bytes, start: int) -> tuple[int, int]:
    value = 0
    for place in range(8):
        byte = data[start + place] if start + place < len(data) else 0
        value |= (byte & 127) << (7 * place)
        if byte < 128:
            return value, start + place + 1
    return value, start + 8


def _size_in_sequence(body: bytes) -> tuple[int, int]:
    """Read the largest frame size of a sequence header, whose bits up to there depend on its flags."""
    bits, position = int.from_bytes(body.ljust(64, b"\0")), 8 * 64

    def read(count: int) -> int:
        nonlocal position
        position = max(0, position - count)
        return bits >> position & ((1 << count) - 1)

    read(3 + 1)  # profile, still picture
    if read(1):  # reduced still picture header
        read(5)
    else:
        has_decoder_model = False
        delay_bits = 0
        if read(1):  # timing info
            read(32 + 32)
            if read(1):  # equal picture interval
                zeros = 0
                while zeros < 32 and not read(1):
                    zeros += 1
                read(zeros)
            if has_decoder_model := bool(read(1)):
                delay_bits = read(5) + 1
                read(32 + 5 + 5)
        has_display_delay = read(1)
        for _ in range(read(5) + 1):  # operating points
            read(12)
            if read(5) > 7:  # level
                read(1)
            if has_decoder_model and read(1):
                read(2 * delay_bits + 1)
            if has_display_delay and read(1):
                read(4)
    width_bits, height_bits = read(4) + 1, read(4) + 1
    return read(width_bits) + 1, read(height_bits) + 1
