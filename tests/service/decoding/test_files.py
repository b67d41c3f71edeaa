"""Image files of the kinds that users send, built by the tests."""

import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from service.decoding import images
from service.decoding.codecs import codec_errors, decode
from service.decoding.headers import MAX_BLOCKS, ImageHeader
from service.decoding.images import decode_image, open_image
from service.errors import ImageTooLargeError, InvalidImageError, OutOfMemoryError, ServiceError, UnsupportedMediaError
from tests.service.conftest import CONFIG

Encode = Callable[..., bytes]
SIDE = CONFIG.image_side
LIMIT = 1_000_000
RED = [255, 0, 0]
IHDR_END = 33


def mean_colour(data: bytes, max_pixels: int = LIMIT) -> list[float]:
    return [float(channel) for channel in decode_image(data, CONFIG, max_pixels).float().mean(dim=(1, 2))]


def chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def red(encode: Encode, image_format: str = "PNG", side: int = SIDE, **options: object) -> bytes:
    return encode(Image.new("RGB", (side, side), "red"), image_format, **options)


ZEROS = zlib.compress(bytes(3_000_000))


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"workflow\0\0" + ZEROS),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + ZEROS),
        chunk(b"iCCP", b"profile\0\0" + ZEROS),
        chunk(b"iCCP", b"profile\0\7" + b"no compression of this kind"),
        chunk(b"tEXt", b"prompt\0" + b"x" * 1_400_000),
        chunk(b"eXIf", b"MM\0*\0\0\0\x08" + struct.pack(">HHHII", 1, 0x0112, 5, 200_000, 26) + bytes(1_600_000)),
        chunk(b"tEXt", b"Software\0scanner", checksum=1),
        chunk(b"tIME", bytes(7), checksum=2),
        chunk(b"tRNS", b"\0\1\0\1\0\1", checksum=3),
        chunk(b"acTL", bytes(8)) + chunk(b"fcTL", bytes(26)),
    ],
    ids=[
        "ztxt",
        "itxt",
        "iccp",
        "iccp_unknown",
        "text",
        "exif",
        "text_crc",
        "time_crc",
        "transparency_crc",
        "animated",
    ],
)
def test_png_chunks_without_pixels_are_ignored(encode: Encode, extra: bytes) -> None:
    png = red(encode)
    assert mean_colour(png[:IHDR_END] + extra + png[IHDR_END:]) == RED


def test_a_wrong_checksum_of_pixels_raises_an_error_that_names_the_chunk(encode: Encode) -> None:
    png = bytearray(red(encode))
    png[png.index(b"IDAT") + 10] ^= 1
    with pytest.raises(InvalidImageError, match=r"the checksum of its chunk IDAT at byte 33 is wrong"):
        mean_colour(bytes(png))


def test_a_png_with_too_many_chunks_is_rejected(encode: Encode) -> None:
    png = red(encode)
    with pytest.raises(InvalidImageError, match=f"more than {MAX_BLOCKS} blocks"):
        mean_colour(png[:IHDR_END] + MAX_BLOCKS * chunk(b"tEXt", b"") + png[IHDR_END:])


@pytest.mark.parametrize(("size", "megapixels"), [((8160, 6144), 0.8), ((12_032, 9024), 1.7), ((16_320, 12_240), 3.2)])
def test_the_memory_of_a_large_photograph_is_that_of_its_scaled_down_pixels(
    encode: Encode, size: tuple[int, int], megapixels: float
) -> None:
    # Only the header is read, so a JPEG of 64 x 64 pixels with a changed size stands in for a photograph.
    jpeg = bytearray(encode(Image.new("RGB", (64, 64), "red"), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", size[1], size[0])
    assert open_image(bytes(jpeg), CONFIG, LIMIT * 50).memory_bytes == pytest.approx(4e6 * megapixels, rel=0.05)


def test_the_pixel_limit_applies_to_a_photograph_after_scaling(encode: Encode) -> None:
    jpeg = encode(Image.new("RGB", (4096, 4160), "red"), "JPEG")
    assert mean_colour(jpeg, max_pixels=600_000) == pytest.approx([254, 0, 0], abs=2)
    with pytest.raises(ImageTooLargeError):
        mean_colour(jpeg, max_pixels=200_000)


def test_the_memory_of_a_progressive_jpeg_includes_its_coefficients(encode: Encode) -> None:
    picture = Image.new("RGB", (2000, 2000))
    whole, half = (
        open_image(encode(picture, "JPEG", progressive=True, subsampling=factor), CONFIG, LIMIT * 4)
        for factor in ("4:4:4", "4:2:0")
    )
    assert (whole.kind, half.kind) == ("progressive JPEG", "progressive JPEG")
    assert whole.memory_bytes - half.memory_bytes == 3 * 4_000_000
    with pytest.raises(ImageTooLargeError, match="bytes of memory"):
        open_image(encode(picture, "JPEG", progressive=True), CONFIG, LIMIT * 4, half.memory_bytes - 1)


@pytest.mark.parametrize(
    "options", [{"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}, {}, {"big_tiff": True}]
)
@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L", "RGBA", "1"])
def test_the_first_page_of_a_tiff_is_decoded(encode: Encode, mode: str, options: dict[str, str]) -> None:
    white, red_page = Image.new("RGB", (20, 30), "white").convert(mode), Image.new("RGB", (9, 9), "red")
    data = encode(white, "TIFF", save_all=True, append_images=[red_page], **options)
    assert mean_colour(data) == pytest.approx([255, 255, 255], abs=1)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_tiff_is_turned_upright_once(encode: Encode, orientation: int) -> None:
    upright = Image.new("L", (SIDE, SIDE), "black")
    upright.paste("white", (0, 0, SIDE, SIDE // 2))
    stored = upright.rotate({1: 0, 3: 180, 6: 90}[orientation])
    data = encode(stored, "TIFF", tiffinfo={0x0112: orientation})
    rows = decode_image(data, CONFIG, LIMIT).float().mean(dim=(0, 2))
    assert rows[: SIDE // 2].mean() > 200 > 50 > rows[SIDE // 2 :].mean()


def test_a_tiff_that_lists_millions_of_strips_is_rejected(encode: Encode) -> None:
    tiff = bytearray(encode(Image.new("RGB", (20, 20)), "TIFF"))
    start = tiff.index(struct.pack("<HHI", 273, 4, 1)) if struct.pack("<HHI", 273, 4, 1) in tiff else -1
    assert start > 0
    tiff[start + 4 : start + 8] = struct.pack("<I", 5_000_000)
    with pytest.raises(InvalidImageError, match="5000000 values"):
        mean_colour(bytes(tiff))


def test_avif_and_heic_are_decoded(encode: Encode) -> None:
    for image_format in ("AVIF", "HEIF"):
        assert mean_colour(red(encode, image_format, 64)) == pytest.approx(RED, abs=6)


def test_a_heic_that_is_larger_than_its_header_says_is_not_decoded(encode: Encode) -> None:
    data = red(encode, "HEIF", 64)
    assert decode(ImageHeader("HEIC", 64, 64, data, 12), 64)[0].size == (64, 64)
    with pytest.raises(InvalidImageError, match="two different sizes"):
        decode(ImageHeader("HEIC", 64, 63, data, 12), 64)


def test_heic_without_the_heif_extra_raises_an_error_that_says_what_to_install(
    encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "HAS_HEIC", False)
    with pytest.raises(UnsupportedMediaError, match=r"HEIC.*pip install 'supervit-serve\[heif\]'"):
        open_image(red(encode, "HEIF", 64), CONFIG, LIMIT)


def test_an_avif_with_more_than_one_exif_orientation_is_rejected(encode: Encode) -> None:
    avif = red(encode, "AVIF", 64)
    one, many = (b"MM\0*\0\0\0\x08" + struct.pack(">HHHII", 1, 0x0112, 3, count, 1 << 16) for count in (1, 2_000_000))
    assert open_image(avif + one, CONFIG, LIMIT).kind == "AVIF"
    with pytest.raises(InvalidImageError, match="more than one EXIF orientation"):
        open_image(avif + many, CONFIG, LIMIT)


def bitfields(pixels: np.ndarray, masks: tuple[int, ...], *, is_flipped: bool = True, header_bytes: int = 40) -> bytes:
    """Encode (height, width) pixels of 16 or 32 bits as a BMP with colour masks."""
    height, width = pixels.shape
    body = b"".join(row.tobytes() + bytes(-row.nbytes % 4) for row in (pixels[::-1] if is_flipped else pixels))
    bits = pixels.itemsize * 8
    info = struct.pack(
        "<IiiHHIIiiII", header_bytes, width, height if is_flipped else -height, 1, bits, 3, len(body), 2835, 2835, 0, 0
    )
    header = (info + struct.pack(f"<{len(masks)}I", *masks)).ljust(header_bytes, b"\0")
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + len(header)) + header + body


@pytest.mark.parametrize("is_flipped", [False, True])
@pytest.mark.parametrize(
    ("kind", "masks", "red_half"),
    [
        ("<u4", (0xFF, 0xFF00, 0xFF0000), 0xFF),
        ("<u4", (0xFF0000, 0xFF00, 0xFF), 0xFF0000),
        ("<u4", (0x3FF00000, 0xFFC00, 0x3FF), 0x3FF00000),
        ("<u2", (0xF800, 0x7E0, 0x1F), 0xF800),
        ("<u2", (0x1F, 0x7E0, 0xF800), 0x1F),
    ],
)
def test_a_bmp_with_colour_masks_is_decoded(kind: str, masks: tuple[int, ...], red_half: int, is_flipped: bool) -> None:
    pixels = np.zeros((SIDE, SIDE), kind)
    pixels[: SIDE // 2] = red_half
    image = decode_image(bitfields(pixels, masks, is_flipped=is_flipped), CONFIG, LIMIT).float()
    assert image[:, : SIDE // 2].mean(dim=(1, 2)).tolist() == RED
    assert image[:, SIDE // 2 :].max() == 0


def test_transparent_pixels_of_a_bmp_are_shown_on_white_unless_all_are_transparent() -> None:
    masks = (0xFF, 0xFF00, 0xFF0000, 0xFF000000)
    pixels = np.full((SIDE, SIDE), 0x000000FF, "<u4")
    assert mean_colour(bitfields(pixels, masks, header_bytes=56)) == RED
    pixels[: SIDE // 2] |= 0xFF000000
    assert mean_colour(bitfields(pixels, masks, header_bytes=56)) == [255, 127.5, 127.5]


def shapes(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)).resize((width, height))


@pytest.mark.parametrize(("image_format", "options"), [("JPEG", {"quality": 85}), ("PNG", {}), ("GIF", {})])
def test_the_error_for_a_truncated_file_states_the_share_of_its_rows(
    encode: Encode, image_format: str, options: dict[str, int]
) -> None:
    data = encode(shapes(640, 480), image_format, **options)
    with pytest.raises(InvalidImageError) as caught:
        mean_colour(data[: len(data) // 2])
    found = re.fullmatch(r"the file is truncated: it has (\d+) % of its rows", caught.value.message)
    assert found is not None
    assert 35 < int(found[1]) < 65


def complaint(data: bytes) -> str | None:
    try:
        mean_colour(data)
    except ServiceError as error:
        return error.message
    return None


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"])
def test_error_messages_are_never_those_of_a_library(encode: Encode, image_format: str) -> None:
    data = encode(shapes(64, 48), image_format)
    cuts = [data[: len(data) * part // 8] for part in range(1, 8)]
    places = range(0, len(data), max(1, len(data) // 40))
    broken = [data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :] for at in places]
    said = re.compile(r"the (file|image|\w+) (is truncated|is broken|has)|not an image in")
    messages = [message for spoilt in (*cuts, *broken) if (message := complaint(spoilt)) is not None]
    assert messages
    assert [message for message in messages if not said.match(message)] == []


def test_decoding_broken_images_writes_nothing_to_stderr() -> None:
    program = (
        "import io, sys\n"
        "from PIL import Image\n"
        "from tests.service.conftest import CONFIG\n"
        "from service.decoding.images import decode_image\n"
        "for name in ('JPEG', 'PNG', 'WEBP', 'GIF', 'TIFF', 'AVIF'):\n"
        "    buffer = io.BytesIO()\n"
        "    options = {'compression': 'tiff_lzw'} if name == 'TIFF' else {}\n"
        "    Image.effect_noise((64, 48), 50).convert('RGB').save(buffer, name, **options)\n"
        "    data = bytearray(buffer.getvalue())\n"
        "    for at in range(0, len(data), len(data) // 50):\n"
        "        data[at] ^= 255\n"
        "        try:\n"
        "            decode_image(bytes(data), CONFIG, 10 ** 6)\n"
        "        except Exception as error:\n"
        "            assert type(error).__module__ == 'service.errors', repr(error)\n"
        "        data[at] ^= 255\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_fill_bytes_and_comments_of_a_jpeg_add_no_cost_and_are_bounded(encode: Encode) -> None:
    jpeg = red(encode, "JPEG", 64)
    for filling in (b"\xff" * 900_000, b"\x01" * 900_000, 1000 * b"\xff\xfe\x00\x04ab"):
        opened = open_image(jpeg[:20] + filling + jpeg[20:], CONFIG, LIMIT)
        assert opened.cost_s == open_image(jpeg, CONFIG, LIMIT).cost_s
        assert opened.decode().float().mean(dim=(1, 2)).tolist() == pytest.approx(RED, abs=3)
    with pytest.raises(InvalidImageError, match="more than 1000000 bytes between two of its segments"):
        open_image(jpeg[:20] + b"\xff" * 2_000_000 + jpeg[20:], CONFIG, LIMIT)
    with pytest.raises(InvalidImageError, match=f"more than {MAX_BLOCKS} blocks"):
        open_image(jpeg[:2] + MAX_BLOCKS * b"\xff\xfe\x00\x02" + jpeg[2:], CONFIG, LIMIT)


def test_comments_of_a_gif_are_skipped_and_bounded(encode: Encode) -> None:
    gif = red(encode, "GIF")
    start = gif.index(b",", 13)

    def commented(blocks: int) -> bytes:
        return gif[:start] + b"!\xfe" + blocks * b"\x01x" + b"\0" + gif[start:]

    assert mean_colour(commented(1000)) == pytest.approx(RED, abs=1)
    with pytest.raises(InvalidImageError, match=f"more than {MAX_BLOCKS} blocks"):
        mean_colour(commented(MAX_BLOCKS + 1))


def test_an_image_with_a_side_over_a_million_pixels_is_rejected() -> None:
    body = b"IHDR" + struct.pack(">IIBBBBB", 1, 1_000_001, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    with pytest.raises(ImageTooLargeError, match="a side may have at most"):
        open_image(png, CONFIG, 50 * LIMIT)


@pytest.mark.parametrize(("image_format", "per_pixel"), [("PNG", 4), ("WEBP", 8), ("AVIF", 12), ("GIF", 1)])
def test_the_memory_limit_applies_to_the_memory_that_the_codec_takes(
    encode: Encode, image_format: str, per_pixel: int
) -> None:
    data = encode(Image.new("RGB", (100, 80)), image_format)
    assert open_image(data, CONFIG, LIMIT, 8000 * per_pixel).memory_bytes == 8000 * per_pixel
    with pytest.raises(ImageTooLargeError, match="bytes of memory") as caught:
        open_image(data, CONFIG, LIMIT, 8000 * per_pixel - 1)
    assert caught.value.details == {"max_decode_bytes": 8000 * per_pixel - 1}


def test_the_first_frame_of_an_animated_webp_is_decoded(encode: Encode) -> None:
    frames = [Image.new("RGBA", (20, 20), colour) for colour in ("red", "blue")]
    for options in ({"lossless": True}, {"quality": 90}):
        data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], **options)
        assert mean_colour(data) == pytest.approx(RED, abs=4)


def test_a_codec_that_runs_out_of_memory_raises_an_out_of_memory_error() -> None:
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")):
        with pytest.raises(OutOfMemoryError), codec_errors("PNG"):
            raise error


def test_a_jpeg_with_more_pixels_may_have_fewer_scans(encode: Encode) -> None:
    jpeg = bytearray(encode(Image.new("L", (64, 64)), "JPEG", progressive=True))
    frame = jpeg.index(b"\xff\xc2")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 16_000, 16_000)  # at this size, 6 scans are allowed
    scans = jpeg.count(b"\xff\xda")
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    opened = open_image(bytes(jpeg[:-2] + last * (7 - scans) + jpeg[-2:]), CONFIG, 50 * LIMIT)
    with pytest.raises(ImageTooLargeError, match="in more than 6 scans"):
        opened.decode()


def test_a_webp_cannot_declare_another_size_behind_its_pixels(encode: Encode) -> None:
    webp = red(encode, "WEBP", side=64, lossless=True)
    header = bytes(4) + (0).to_bytes(3, "little") * 2  # 1 x 1
    later = webp[12:] + b"VP8X" + struct.pack("<I", len(header)) + header
    hidden = b"RIFF" + struct.pack("<I", 4 + len(later)) + b"WEBP" + later
    with pytest.raises(ImageTooLargeError):
        mean_colour(hidden, max_pixels=64 * 64 - 1)
    assert mean_colour(hidden) == RED
    before = b"VP8X" + struct.pack("<I", len(header)) + header + webp[12:]
    with pytest.raises(InvalidImageError, match="the WebP has no valid size"):
        mean_colour(b"RIFF" + struct.pack("<I", 4 + len(before)) + b"WEBP" + before)


def test_a_tiff_with_tiles_far_larger_than_its_picture_is_rejected() -> None:
    def tiled(side: int, kind: int = 4) -> bytes:
        """Return a TIFF of a grey tile of that many pixels a side, of which the picture shows a corner."""
        pixels = zlib.compress(bytes([200]) * side * side)
        entries = [
            (256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1),
            (322, kind, 1, side), (323, kind, 1, side), (324, 4, 1, 8), (325, 4, 1, len(pixels)),
        ]  # fmt: skip
        directory = struct.pack("<H", len(entries)) + b"".join(
            struct.pack("<HHI", *entry[:3]) + struct.pack("<I", entry[3]) for entry in entries
        )
        return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory + bytes(4)

    assert mean_colour(tiled(256)) == pytest.approx([200] * 3)
    for kind in (3, 4, 8, 9):
        with pytest.raises(InvalidImageError, match="tiles far larger than its picture"):
            mean_colour(tiled(4096, kind))
    with pytest.raises(InvalidImageError, match="no valid size"):
        mean_colour(tiled(4096, 5))  # a fraction


def test_a_progressive_jpeg_without_components_is_rejected() -> None:
    frame = b"\xff\xc2\x00\x08\x08\x00\x10\x00\x10\x00"
    with pytest.raises(InvalidImageError, match="the JPEG has no valid size"):
        mean_colour(b"\xff\xd8" + frame + b"\xff\xda\x00\x02")


def test_an_error_of_a_headers_reader_is_a_broken_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(data: bytes) -> ImageHeader:
        raise ValueError(f"{len(data)} bytes that nobody thought of")

    monkeypatch.setattr(images, "read_header", fail)
    with pytest.raises(InvalidImageError, match="the PNG is broken"):
        open_image(b"\x89PNG\r\n\x1a\n", CONFIG, LIMIT)


def test_a_bmp_with_the_header_of_1987_is_decoded() -> None:
    row = bytes((0, 0, 255)) * SIDE + bytes(-3 * SIDE % 4)
    header = struct.pack("<IHHHH", 12, SIDE, SIDE, 1, 24)
    data = b"BM" + struct.pack("<IHHI", 26 + SIDE * len(row), 0, 0, 26) + header + SIDE * row
    assert mean_colour(data) == RED


@pytest.mark.parametrize(("side", "is_accepted"), [(SIDE, True), (1001, False)])
def test_a_bmp_of_run_lengths_is_decoded_up_to_a_size(side: int, is_accepted: bool) -> None:
    palette = bytes((0, 0, 255, 0))
    runs = (bytes((min(side, 255), 0)) + b"\0\0") * side + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(runs), 0, 0, 1, 1)
    data = b"BM" + struct.pack("<IHHI", 58 + len(runs), 0, 0, 58) + header + palette + runs
    if is_accepted:
        assert mean_colour(data) == RED
    else:
        with pytest.raises(ImageTooLargeError, match="at most 1000000 pixels"):
            open_image(data, CONFIG, 10**9)


def test_the_memory_of_a_png_depends_on_its_channels_and_their_depth(encode: Encode) -> None:
    small, deep, coloured = (
        open_image(encode(image), CONFIG, LIMIT).memory_bytes
        for image in (
            Image.new("L", (500, 500)),
            Image.fromarray(np.zeros((500, 500), np.uint16)),
            Image.new("RGB", (500, 500)),
        )
    )
    assert (deep - small, coloured - small) == (500 * 500, 3 * 500 * 500)


@pytest.mark.parametrize("size", [(1, 1), (1, 2)])
def test_the_smallest_bmps_are_decoded(encode: Encode, size: tuple[int, int]) -> None:
    assert mean_colour(encode(Image.new("RGB", size, "red"), "BMP")) == RED
