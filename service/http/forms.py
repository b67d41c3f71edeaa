"""Multipart forms as browsers, curl and phones send them: a parser from bytes to images and other fields.

Starlette's parser recognises a file by its filename alone, which not every client sends.
"""

from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.decoding import base64_text
from service.domain import MAX_IMAGES
from service.errors import InvalidImageError, InvalidParameterError

IMAGE_FIELD = "file"
MAX_FIELDS = 16
MAX_FIELD_BYTES = 256
# Media types of clients that name no image type: none, the generic one, that of object stores, and the default of
# `curl --data-binary`.
UNTYPED = (*base64_text.UNTYPED, "application/x-www-form-urlencoded")


@dataclass(frozen=True, slots=True)
class Form:
    """The content of a form.

    Attributes:
        images: the bytes of each image, in order; at least one.
        fields: name and text of each other field, in order.
    """

    images: tuple[bytes, ...]
    fields: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class _Part:
    name: str = ""
    is_image: bool = False
    data: bytearray = field(default_factory=bytearray)


class FormReader:
    """Incremental parser of a multipart form."""

    def __init__(self, content_type: str, image_fields: tuple[str, ...] = (IMAGE_FIELD,)) -> None:
        """Create the parser.

        Args:
            content_type: the Content-Type header, which holds the boundary of the parts.
            image_fields: names of the fields that hold images whatever their media type.

        Raises:
            InvalidImageError: the header has no boundary, or one that is too long.
        """
        self._image_fields = image_fields
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise InvalidImageError("invalid form: the content type has no boundary")
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._take_header_name,
                    "on_header_value": self._take_header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._take_data,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise InvalidImageError("invalid form: the boundary is too long") from error
        self._parts: list[_Part] = []
        self._headers: dict[str, str] = {}
        self._header_name, self._header_value = b"", b""
        self._num_images = 0
        self._has_ended = False

    def feed(self, data: bytes) -> None:
        """Parse the next bytes.

        Raises:
            InvalidImageError: the bytes are no form, or the form has too many images.
            InvalidParameterError: the form has too many other fields, or one is too long.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidImageError("invalid form: its parts do not match the boundary in its content type") from error

    def close(self) -> Form:
        """Return the parsed form.

        Raises:
            InvalidImageError: the form has no end, no image, or images under several names.
        """
        if not self._has_ended:
            raise InvalidImageError("the form is truncated")
        images, field = [part for part in self._parts if part.is_image], self._image_fields[0]
        if not images:
            raise InvalidImageError(f"the form has no image; send it as the field {field!r}")
        if len({part.name for part in images}) > 1:
            raise InvalidImageError(f"the form has images in fields of different names; send all of them as {field!r}")
        fields = tuple((part.name, _text(part)) for part in self._parts if not part.is_image)
        return Form(tuple(bytes(part.data) for part in images), fields)

    def _begin_part(self) -> None:
        self._parts.append(_Part())
        self._headers = {}

    def _take_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header_name.decode("latin-1").lower()] = self._header_value.decode("latin-1")
        self._header_name, self._header_value = b"", b""

    def _end_headers(self) -> None:
        part = self._parts[-1]
        options = parse_options_header(self._headers.get("content-disposition", ""))[1]
        part.name = options.get(b"name", b"").decode("utf-8", "replace")
        media_type = self._headers.get("content-type", "").partition(";")[0].strip().lower()
        is_file = b"filename" in options and media_type in UNTYPED
        part.is_image = part.name in self._image_fields or media_type.startswith("image/") or is_file
        self._num_images += part.is_image
        if self._num_images > MAX_IMAGES:
            raise InvalidImageError(f"the form has more than {MAX_IMAGES} images")
        if len(self._parts) - self._num_images > MAX_FIELDS:
            raise InvalidParameterError(f"the form has more than {MAX_FIELDS} fields")

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        part = self._parts[-1]
        part.data += memoryview(data)[start:end]
        if not part.is_image and len(part.data) > MAX_FIELD_BYTES:
            raise InvalidParameterError(f"{part.name}: must have at most {MAX_FIELD_BYTES} bytes", parameter=part.name)

    def _end(self) -> None:
        self._has_ended = True


def _text(part: _Part) -> str:
    try:
        return part.data.decode()
    except UnicodeDecodeError as error:
        raise InvalidParameterError(f"{part.name}: must be UTF-8 text", parameter=part.name) from error
