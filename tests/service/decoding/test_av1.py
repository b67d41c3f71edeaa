import io
import struct
from typing import Any

import pytest
from PIL import Image

from service.decoding.av1 import frame_sizes
from service.decoding.images import decode_image
from service.errors import InvalidImageError
from tests.service.conftest import CONFIG


def avif(size: tuple[int, int], mode: str = "RGB", **options: Any) -> bytes:  # noqa: ANN401 - passed on to Pillow
    buffer = io.BytesIO()
    Image.new(mode, size, 1).save(buffer, "AVIF", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(40, 40), (301, 77)])
@pytest.mark.parametrize("options", [{}, {"quality": 100, "subsampling": "4:4:4"}, {"speed": 10}])
def test_the_size_of_a_still_is_read(size: tuple[int, int], options: dict[str, Any]) -> None:
    assert list(frame_sizes(avif(size, **options))) == [size]


def test_the_sizes_of_transparency_and_of_an_animation_are_read() -> None:
    assert list(frame_sizes(avif((64, 48), "RGBA"))) == [(64, 48)] * 2
    more = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
    assert set(frame_sizes(avif((64, 48), save_all=True, append_images=more))) == {(64, 48)}


def test_frames_larger_than_the_file_says_are_rejected() -> None:
    honest = avif((640, 480))
    decode_image(honest, CONFIG, 1_000_000)
    declared = struct.pack(">II", 640, 480)
    assert honest.count(declared) == 1
    hidden = honest.replace(declared, struct.pack(">II", 64, 48))
    with pytest.raises(InvalidImageError, match="it declares two different sizes"):
        decode_image(hidden, CONFIG, 64 * 48)


def split(whole: bytes, at: int) -> bytes:
    """Return the AVIF of one item with its data in two extents, the first of them `at` bytes long."""
    place = whole.index(b"iloc") + 4
    version, sizes, count = whole[place], whole[place + 4 : place + 6], int.from_bytes(whole[place + 6 : place + 8])
    assert (version, sizes, count) == (0, b"\x44\x00", 1)
    entry = place + 8
    offset, length = struct.unpack_from(">II", whole, entry + 6)
    extra = struct.pack(">II", offset + 8 + at, length - at)
    table = whole[:entry] + whole[entry : entry + 4] + struct.pack(">HII", 2, offset + 8, at) + extra
    grown = bytearray(table + whole[entry + 14 :])
    for box in (b"iloc", b"meta"):
        start = grown.index(box) - 4
        grown[start : start + 4] = (int.from_bytes(grown[start : start + 4]) + 8).to_bytes(4)
    return bytes(grown)


def test_an_item_in_several_parts_is_read_whole() -> None:
    whole = avif((64, 48))
    for at in (1, 3, 9):
        parts = split(whole, at)
        assert list(frame_sizes(parts)) == [(64, 48)]
        decode_image(parts, CONFIG, 64 * 48)


def test_a_decoy_of_an_items_data_hides_nothing() -> None:
    large, small = avif((640, 480)), avif((64, 48))
    place = large.index(b"iloc") + 4
    offset, length = struct.unpack_from(">II", large, place + 14)
    pixels = large[offset : offset + length]
    data = struct.pack(">I", 8 + length) + b"idat" + pixels
    decoy = struct.pack(">I", 8 + len(small)) + b"idat" + small[small.index(b"mdat") + 4 :].ljust(len(small), b"\0")
    in_idat = bytearray(large.replace(struct.pack(">II", 640, 480), struct.pack(">II", 64, 48)))
    in_idat[place] = 1  # the version of iloc with a construction method
    entry = place + 8
    in_idat[entry + 2 : entry + 2] = b"\0\1"
    struct.pack_into(">I", in_idat, entry + 8, 0)
    for box in (b"iloc", b"meta"):
        start = in_idat.index(box) - 4
        in_idat[start : start + 4] = (int.from_bytes(in_idat[start : start + 4]) + 2).to_bytes(4)
    assert (640, 480) in list(frame_sizes(bytes(in_idat) + data + decoy))


def sequence_header(*fields: tuple[int, int]) -> bytes:
    """Return the OBU of a sequence header of the given (value, bits) up to its size, which is 640 x 480."""
    text = "".join(f"{value:0{bits}b}" for value, bits in (*fields, (9, 4), (8, 4), (639, 10), (479, 9)))
    text += "0" * (-len(text) % 8)
    body = int(text, 2).to_bytes(len(text) // 8)
    return bytes((1 << 3 | 2, len(body))) + body


STILL, MOVING = [(0, 4), (1, 1), (3, 5)], [(0, 4), (0, 1)]
NO_TIMING = [*MOVING, (0, 1)]
TICKS = [(1, 1), (5, 32), (7, 32)]  # timing info


@pytest.mark.parametrize(
    "fields",
    [
        STILL,
        [*NO_TIMING, (0, 1), (0, 5), (0, 12), (5, 5)],
        [*NO_TIMING, (0, 1), (0, 5), (0, 12), (8, 5), (1, 1)],  # a level with a tier
        [*NO_TIMING, (0, 1), (1, 5), (0, 12), (5, 5), (1, 12), (9, 5), (0, 1)],  # two operating points
        [*NO_TIMING, (1, 1), (0, 5), (0, 12), (5, 5), (1, 1), (3, 4)],  # a display delay
        [*NO_TIMING, (1, 1), (0, 5), (0, 12), (5, 5), (0, 1)],
        [*MOVING, *TICKS, (0, 1), (0, 1), (0, 1), (0, 5), (0, 12), (5, 5)],
        [*MOVING, *TICKS, (1, 1), (1, 3), (1, 2), (0, 1), (0, 1), (0, 5), (0, 12), (5, 5)],  # equal intervals
        # A decoder model whose delays have 11 bits, for this operating point or not.
        [*MOVING, *TICKS, (0, 1), (1, 1), (10, 5), (9, 32), (9, 10), (0, 1), (0, 5), (0, 12), (5, 5), (1, 1), (7, 23)],
        [*MOVING, *TICKS, (0, 1), (1, 1), (10, 5), (9, 32), (9, 10), (0, 1), (0, 5), (0, 12), (5, 5), (0, 1)],
    ],
)
def test_the_size_is_found_behind_all_optional_fields_of_a_sequence_header(fields: list[tuple[int, int]]) -> None:
    whole = avif((64, 48))
    offset, length = struct.unpack_from(">II", whole, whole.index(b"iloc") + 18)
    item = sequence_header(*fields)
    assert len(item) <= length, "it must fit into the item of the file"
    assert (640, 480) in list(frame_sizes(whole[:offset] + item + whole[offset + len(item) :]))


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.7])
def test_a_truncated_avif_is_rejected(kept: float) -> None:
    whole = avif((64, 48))
    with pytest.raises(InvalidImageError):
        decode_image(whole[: int(kept * len(whole))], CONFIG, 1_000_000)


def test_no_bytes_make_the_reader_fail_otherwise() -> None:
    whole = bytearray(avif((64, 48)))
    for place in range(len(whole)):
        for value in (0, 1, 255):
            broken = whole.copy()
            broken[place] = value
            try:
                list(frame_sizes(bytes(broken)))
            except InvalidImageError:
                continue
