import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate

from models.data.images import evaluation_transform, to_rgb
from models.subnetwork import SuperViTConfig
from models.supervit import DEIT_SMALL, LVVIT_MICRO, LVVIT_SMALL
from service.decoding.images import HAS_FAST_RESIZE, decode_image, open_image
from service.decoding.jpeg import MAX_SCANS
from service.errors import ImageTooLargeError, InvalidImageError
from tests.service.conftest import CONFIG

SIDE = CONFIG.image_side
LIMIT = 1_000_000


def decode(data: bytes, max_pixels: int = LIMIT) -> torch.Tensor:
    return decode_image(data, CONFIG, max_pixels)


def mean_colour(data: bytes) -> list[float]:
    return [float(channel) for channel in decode(data).float().mean(dim=(1, 2))]


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"])
def test_every_format_decodes_to_the_encoded_picture(encode: Callable[..., bytes], image_format: str) -> None:
    image = decode(encode(Image.new("RGB", (50, 30), (200, 100, 50)), image_format))
    assert image.shape == (3, SIDE, SIDE)
    assert image.dtype == torch.uint8
    assert image.float().mean(dim=(1, 2)).tolist() == pytest.approx([200, 100, 50], abs=4)


def test_an_unknown_format_is_rejected(encode: Callable[..., bytes]) -> None:
    with pytest.raises(InvalidImageError, match="not an image in a supported format"):
        decode(encode(Image.new("RGB", (9, 9)), "PPM"))


def test_only_the_first_frame_of_an_animation_is_decoded(encode: Callable[..., bytes]) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert mean_colour(data) == pytest.approx([255, 0, 0], abs=4)


def test_grey_palette_bilevel_and_cmyk_pictures_keep_their_colours(encode: Callable[..., bytes]) -> None:
    red = Image.new("RGB", (20, 20), "red")
    assert mean_colour(encode(Image.new("L", (20, 20), 90))) == pytest.approx([90, 90, 90])
    assert mean_colour(encode(red.convert("P"))) == pytest.approx([255, 0, 0], abs=4)
    assert mean_colour(encode(Image.new("1", (20, 20), 1))) == pytest.approx([255, 255, 255])
    assert mean_colour(encode(red.convert("CMYK"), "JPEG")) == pytest.approx([255, 0, 0], abs=6)


def test_transparent_pixels_are_shown_on_white(encode: Callable[..., bytes]) -> None:
    half_red = Image.new("RGBA", (20, 20), (255, 0, 0, 128))
    assert mean_colour(encode(half_red)) == pytest.approx([255, 127, 127], abs=2)
    assert mean_colour(encode(half_red, "WEBP", lossless=True)) == pytest.approx([255, 127, 127], abs=2)
    assert mean_colour(encode(Image.new("LA", (20, 20), (0, 0)))) == pytest.approx([255, 255, 255])
    palette = Image.new("P", (20, 20), 3)
    palette.putpalette([value for index in range(8) for value in (index, 0, 0)])
    for image_format in ("PNG", "GIF"):
        assert mean_colour(encode(palette, image_format, transparency=3)) == pytest.approx([255, 255, 255])


def test_a_palette_image_without_its_palette_is_rejected(encode: Callable[..., bytes]) -> None:
    whole = encode(Image.new("P", (20, 20), 3))
    start = whole.index(b"PLTE") - 4
    length = int.from_bytes(whole[start : start + 4], "big")
    with pytest.raises(InvalidImageError):
        decode(whole[:start] + whole[start + 12 + length :])


def test_sixteen_bit_grey_is_scaled_rather_than_clipped(encode: Callable[..., bytes]) -> None:
    grey = Image.fromarray(np.full((20, 20), 0x4000, dtype=np.uint16))
    assert mean_colour(encode(grey)) == pytest.approx([64, 64, 64], abs=1)


@pytest.mark.parametrize(
    ("dtype", "level", "shown"),
    [
        (np.float32, 0.25, 64),
        (np.float32, 64.0, 64),
        (np.float32, 16384.0, 64),
        (np.int32, 64, 64),
        (np.int32, 16384, 64),
        (np.int32, -5, 0),
        (np.float32, np.nan, 0),
    ],
)
def test_grey_of_32_bits_is_scaled_by_the_range_of_its_values(
    encode: Callable[..., bytes], dtype: type, level: float, shown: int
) -> None:
    pixels: npt.NDArray[np.float32 | np.int32] = np.full((20, 20), level, dtype)
    assert mean_colour(encode(Image.fromarray(pixels), "TIFF")) == pytest.approx([shown] * 3, abs=1)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "HEIF"])
def test_a_picture_is_turned_upright_by_its_exif_orientation(encode: Callable[..., bytes], image_format: str) -> None:
    upright = Image.new("RGB", (SIDE, SIDE), "black")
    upright.paste("white", (0, 0, SIDE, SIDE // 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    data = encode(upright.rotate(90), image_format, exif=exif.tobytes() if image_format == "HEIF" else exif)
    rows = decode(data).float().mean(dim=(0, 2))
    assert rows[: SIDE // 2].mean() > 200
    assert rows[SIDE // 2 :].mean() < 50


def test_a_single_pixel_and_an_extremely_long_strip_are_decoded(encode: Callable[..., bytes]) -> None:
    assert decode(encode(Image.new("RGB", (1, 1), "red"))).shape == (3, SIDE, SIDE)
    assert decode(encode(Image.new("L", (1, 60_000), 7))).float().mean() == pytest.approx(7)


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + struct.pack(">I", 9) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("side", [1001, 60_000, 2_000_000])
def test_a_decompression_bomb_is_rejected_from_its_header_alone(side: int) -> None:
    with pytest.raises(ImageTooLargeError) as caught:
        decode(png_header(side, side))
    assert caught.value.details == {"max_image_pixels": LIMIT}


def test_a_large_image_within_the_limit_raises_no_warning(encode: Callable[..., bytes]) -> None:
    data = encode(Image.new("1", (10_000, 8_900)))
    assert decode(data, max_pixels=89_000_000).shape == (3, SIDE, SIDE)


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", b"GIF89a", b"BM" + bytes(60), bytes(1000)])
def test_bytes_that_are_not_an_image_are_rejected(data: bytes) -> None:
    with pytest.raises(InvalidImageError):
        decode(data)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_damaged_images_are_decoded_or_rejected_but_never_crash(
    encode: Callable[..., bytes], image_format: str
) -> None:
    rng = random.Random(image_format)
    noise = Image.frombytes("RGB", (24, 24), rng.randbytes(24 * 24 * 3))
    intact = encode(noise, image_format)
    refused = 0
    for _ in range(300):
        data = bytearray(intact)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        cut = rng.choice([len(data), rng.randrange(len(data))])
        try:
            decode(bytes(data[:cut]))
        except (InvalidImageError, ImageTooLargeError):
            refused += 1
    assert refused > 0


def test_a_truncated_jpeg_is_rejected(encode: Callable[..., bytes]) -> None:
    with pytest.raises(InvalidImageError, match=r"^the file is truncated: it has \d+ % of its rows$"):
        decode(encode(picture(400, 300), "JPEG")[:-1000])


@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_is_rejected_when_it_is_scaled_down(encode: Callable[..., bytes], progressive: bool) -> None:
    data = encode(picture(1500, 1100), "JPEG", progressive=progressive)
    for cut in (2, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(InvalidImageError, match=r"^the file is truncated: "):
            decode(data[:-cut], max_pixels=2_000_000)


def progressive(encode: Callable[..., bytes]) -> tuple[bytes, bytes]:
    """Return a progressive JPEG without its end marker, and its last scan."""
    data = encode(Image.new("L", (16, 16), 90), "JPEG", progressive=True)
    assert data.endswith(b"\xff\xd9")
    return data[:-2], data[data.rindex(b"\xff\xda") : -2]


def test_a_jpeg_with_too_many_scans_is_rejected(encode: Callable[..., bytes]) -> None:
    beginning, scan = progressive(encode)
    scans = beginning.count(b"\xff\xda")
    fine = beginning + (MAX_SCANS - scans) * scan + b"\xff\xd9"
    assert decode(fine).shape == (3, SIDE, SIDE)
    assert decode(fine + 1000 * scan).shape == (3, SIDE, SIDE), "bytes after the end marker are not decoded"
    with pytest.raises(InvalidImageError, match="scans"):
        decode(beginning + (MAX_SCANS + 1 - scans) * scan + b"\xff\xd9")


def test_scan_markers_in_metadata_do_not_count_and_cannot_hide_real_scans(encode: Callable[..., bytes]) -> None:
    data = encode(Image.new("RGB", (16, 16), (255, 0, 0)), "JPEG", comment=1000 * b"\xff\xda\xff\xd9")
    assert mean_colour(data)[0] > 250
    beginning, scan = progressive(encode)
    bomb = beginning + MAX_SCANS * scan + b"\xff\xd9"
    in_a_comment = bomb[:2] + b"\xff\xfe\x00\x04\xff\xd9" + bomb[2:]
    after_an_empty_image = b"\xff\xd8\xff\xd9" + bomb
    # libjpeg skips this marker within a scan. If it began a segment, the segment would hide the next 65,535 bytes.
    behind_a_marker = beginning + b"\xff\x02\xff\xff" + MAX_SCANS * scan + b"\xff\xd9"
    for data in (in_a_comment, after_an_empty_image, behind_a_marker):
        with pytest.raises(InvalidImageError, match="scans"):
            decode(data)


def picture(width: int, height: int) -> Image.Image:
    """Draw soft shapes of all sizes down to a few pixels, and sharp edges, which resizing can get wrong."""
    rng = np.random.default_rng(width * height)
    image = Image.new("RGB", (width, height), (128, 90, 60))
    for blobs in (3, 12, 48):
        noise = Image.fromarray(rng.integers(0, 256, (blobs, blobs, 3), dtype=np.uint8))
        image = Image.blend(image, noise.resize((width, height), Image.Resampling.BICUBIC), 0.5)
    image.paste("white", (width // 3, height // 3, width // 2, height // 2))
    return image


def difference(
    data: bytes, config: SuperViTConfig, max_pixels: int = 4_000_000, *, fast_resize: bool = HAS_FAST_RESIZE
) -> torch.Tensor:
    """Return by how many levels of 0..255 each value differs from the result of the evaluation transform."""
    with Image.open(io.BytesIO(data)) as image:
        expected = evaluation_transform(config)(to_rgb(image))
    got = decode_image(data, config, max_pixels, fast_resize=fast_resize)
    assert (got.shape, got.dtype) == (expected.shape, torch.uint8)
    return (got.short() - expected.short()).abs().float()


@pytest.mark.parametrize("config", [DEIT_SMALL, LVVIT_SMALL, LVVIT_MICRO])
@pytest.mark.parametrize(
    "size", [(500, 375), (333, 499), (375, 1000), (161, 170), (256, 256), (32, 32), (31, 40), (3, 900), (7, 7)]
)
def test_a_picture_of_any_shape_matches_the_evaluation_transform(
    encode: Callable[..., bytes], config: SuperViTConfig, size: tuple[int, int]
) -> None:
    for image_format in ("PNG", "JPEG"):
        levels = difference(encode(picture(*size), image_format), config)
        assert levels.max() <= 8  # Pillow may resize the other side first, and so clip elsewhere
        assert levels.mean() < 0.15


def test_a_picture_of_the_models_input_size_is_unchanged(encode: Callable[..., bytes]) -> None:
    image = picture(LVVIT_MICRO.image_side, LVVIT_MICRO.image_side)
    assert np.array_equal(decode_image(encode(image), LVVIT_MICRO, LIMIT).permute(1, 2, 0).numpy(), np.asarray(image))


@pytest.mark.parametrize(("image_format", "options"), [("JPEG", {"quality": 95}), ("PNG", {"compress_level": 1})])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_large_photos_match_the_evaluation_transform_in_any_orientation(
    encode: Callable[..., bytes], orientation: int, image_format: str, options: dict[str, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(1201, 1033), image_format, exif=exif, **options)  # sides that no scale divides evenly
    # Aligning the picture to whole pixels would make the difference 0.6 or more.
    assert difference(data, DEIT_SMALL).mean() < 0.3
    assert difference(data, LVVIT_MICRO).mean() < 0.3


def test_a_large_panorama_is_cropped_around_its_centre(encode: Callable[..., bytes]) -> None:
    strip = Image.new("RGB", (10_000, 1030), "red")
    strip.paste("blue", (4_000, 0, 6_000, 1030))
    for image_format in ("JPEG", "PNG"):
        image = decode(encode(strip, image_format), max_pixels=11_000_000)
        assert image.float().mean(dim=(1, 2)).tolist() == pytest.approx([0, 0, 255], abs=4)


@pytest.mark.parametrize(
    ("size", "config", "decoded"),
    [
        ((1023, 1500), DEIT_SMALL, (1023, 1500)),
        ((1024, 1500), DEIT_SMALL, (512, 750)),
        ((2047, 2600), DEIT_SMALL, (1024, 1300)),
        ((2048, 2600), DEIT_SMALL, (512, 650)),
        ((1024, 1500), LVVIT_MICRO, (512, 750)),
        ((500, 375), LVVIT_MICRO, (500, 375)),
        ((1024, 1500), replace(DEIT_SMALL, crop_fraction=0.8), (1024, 1500)),
    ],
)
def test_a_large_jpeg_is_scaled_down_to_at_least_twice_the_resized_side(
    encode: Callable[..., bytes], size: tuple[int, int], config: SuperViTConfig, decoded: tuple[int, int]
) -> None:
    data, pixels = encode(Image.new("RGB", size), "JPEG"), decoded[0] * decoded[1]
    assert open_image(data, config, max_pixels=pixels).memory_bytes == 4 * pixels
    with pytest.raises(ImageTooLargeError):
        open_image(data, config, max_pixels=pixels - 1)


@pytest.mark.parametrize(
    ("size", "resized"), [((1100, 1800), (550, 900)), ((1, 20_000), (1, 8)), ((20_000, 1), (8, 1)), ((9, 9), (9, 9))]
)
def test_a_large_picture_is_averaged_and_a_long_one_cropped_before_resizing(
    encode: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], resized: tuple[int, int]
) -> None:
    seen = []

    def record(images: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append((images.shape[3], images.shape[2]))
        return interpolate(images, **options)  # type: ignore[arg-type] # passed on

    monkeypatch.setattr("service.decoding.images.interpolate", record)
    decode_image(encode(Image.new("1", size)), DEIT_SMALL, 2_000_000)
    assert seen == [resized]


def test_the_result_without_fast_resize_equals_that_of_the_evaluation_transform(encode: Callable[..., bytes]) -> None:
    exif = Image.Exif()
    for orientation in (1, 6):
        exif[0x0112] = orientation
        data = encode(picture(500, 375), "JPEG", exif=exif)
        assert difference(data, DEIT_SMALL, fast_resize=False).max() == 0


@pytest.mark.parametrize(
    "metadata", [b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05", b"\xff" * 50]
)
def test_a_picture_with_broken_metadata_is_decoded(encode: Callable[..., bytes], metadata: bytes) -> None:
    data = encode(Image.new("RGB", (20, 20), "red"), "JPEG", exif=metadata)
    assert mean_colour(data) == pytest.approx([254, 0, 0], abs=4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(encode: Callable[..., bytes], orientation: int) -> None:
    upright = Image.new("RGB", (SIDE, SIDE), "black")
    upright.paste("white", (0, 0, SIDE, SIDE // 2))
    upright.paste("red", (0, 0, SIDE // 2, SIDE // 2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = next(  # as a camera would store it: the variant that `exif_transpose` turns upright
        image
        for image in [upright, *(upright.transpose(turn) for turn in Image.Transpose)]
        if ImageOps.exif_transpose(tagged(image, exif)).tobytes() == upright.tobytes()
    )
    with Image.open(io.BytesIO(encode(upright, "PNG"))) as image:
        expected = evaluation_transform(CONFIG)(image)
    assert torch.equal(decode(encode(stored, "PNG", exif=exif)), expected)


def tagged(image: Image.Image, exif: Image.Exif) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    return Image.open(buffer)
