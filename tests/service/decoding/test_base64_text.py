import base64

import pytest

from service.decoding.base64_text import CHUNK_CHARS, decode_base64
from service.errors import InvalidImageError, UnsupportedMediaError

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("text", ["aGk=", "aG\n k=\r\n", "data:image/png;base64,aGk=", "data:;base64,aGk="])
async def test_base64_is_decoded_with_line_breaks_and_from_a_data_url(text: str) -> None:
    assert await decode_base64(text) == b"hi"


async def test_base64_longer_than_a_chunk_is_decoded_whole() -> None:
    data = bytes(range(256)) * (CHUNK_CHARS // 128)
    assert await decode_base64(base64.b64encode(data).decode()) == data


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("???", InvalidImageError, "instances: must be base64 or a data URL"),
        ("aGk", InvalidImageError, "instances: must be base64 or a data URL"),
        ("data:image/png,aGk=", InvalidImageError, "instances: the data URL must be in base64"),
        ("data:text/html;base64,aGk=", UnsupportedMediaError, "the data URL must be of an image, not text/html"),
    ],
)
async def test_invalid_base64_and_data_urls_are_rejected_with_the_name_of_the_field(
    text: str, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        await decode_base64(text, "instances")
