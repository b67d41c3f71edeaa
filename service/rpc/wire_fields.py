"""Counts the fields of a message as it is on the wire, before protobuf parses it.

An empty field takes two bytes, and becomes an object: some megabytes of them would block the event loop for seconds.
A number in a list takes one byte, and eight in memory.
"""

from typing import cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

MAX_FIELDS = 1024  # those of nested messages included; a request of many files and parameters has some hundreds
VARINT, FIXED64, BYTES, GROUP, END_OF_GROUP, FIXED32 = range(6)
SIZES = {FIXED64: 8, FIXED32: 4, GROUP: 0, END_OF_GROUP: 0}
PIXELS = {"uint_contents", "fp32_contents", "float_val", "int_val"}  # lists whose numbers take four bytes in memory
TEXTS = {FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_STRING}


def count_fields(data: bytes, message_type: type[Message]) -> int:
    """Count the fields of a message and of its nested messages; the count stops soon after MAX_FIELDS.

    Each byte of a list of numbers is a field, except that a list of pixels is only one.

    Raises:
        ValueError: the bytes are no message.
    """
    try:
        return _count(data, 0, len(data), cast("Descriptor", message_type.DESCRIPTOR))
    except IndexError as error:
        raise ValueError("a field is cut off") from error


def _count(data: bytes, start: int, end: int, described: Descriptor) -> int:
    number = 0
    while start < end and number <= MAX_FIELDS:
        number += 1
        tag, start = _varint(data, start)
        kind = tag & 7
        if kind == VARINT:
            _, start = _varint(data, start)
        elif kind == BYTES:
            length, start = _varint(data, start)
            field = described.fields_by_number.get(tag >> 3)
            if length > end - start:
                raise ValueError("a field is longer than what is left")
            if field is not None and field.message_type is not None:
                number += _count(data, start, start + length, field.message_type)
            elif field is not None and field.name not in PIXELS and field.type not in TEXTS:  # a list of numbers
                number += length
            start += length
        elif kind in SIZES:
            start += SIZES[kind]
        else:
            raise ValueError("there is no such type of field")
    return number


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """Read a varint, and return it and the index after its end."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
    raise ValueError("a number is too long")
