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
