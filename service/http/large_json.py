"""Parsing of large JSON without blocking the event loop: tensor data is parsed in pieces, and the rest is small.

A JSON parser holds the GIL until it is done, on any thread, and makes an object of every number: 40 ms for the pixels
of one photograph.
"""

import asyncio
import re

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json

from service.domain import MAX_IMAGES
from service.errors import InvalidParameterError
from service.inference_protocol.messages import Values

LARGE_BYTES = 1 << 18
PIECE_BYTES = 1 << 16
MAX_LISTS = MAX_IMAGES + 1  # lists extracted from one object; each is searched for its end
MAX_DEPTH = 8  # of nested lists; the search for the end takes as many steps at every bracket
MAX_MEMBERS = 1024  # besides the lists of numbers; counted by `,`, `[` and `{`, none of which is in base64


async def take_numbers(text: bytes, names: tuple[str, ...]) -> tuple[bytes, list[Values]]:
    """Extract the lists of numbers from a JSON object.

    Args:
        text: the object.
        names: names of the members that may hold such lists, at any depth.

    Returns:
        The object with these lists emptied, and the numbers of each list, flat and in order.

    Raises:
        InvalidParameterError: a list holds anything but numbers, or the rest has more than MAX_MEMBERS members.
    """
    opens = re.compile(rb'"(?:%b)"\s*:\s*(\[[\[\s]*)' % "|".join(names).encode())
    kept, taken, start = list[bytes](), list[Values](), 0
    for _ in range(MAX_LISTS):
        opening = opens.search(text, start)
        if opening is None:
            break
        depth = opening[1].count(b"[")
        end = _find_end(text, depth, opening.end()) if depth <= MAX_DEPTH else None
        # A list of strings, without an end or too deep: left to the JSON parser.
        if end is None or text.find(b'"', opening.end(), end.start()) >= 0:
            kept.append(text[start : opening.end()])
            start = opening.end()
            continue
        kept.append(text[start : opening.start(1)] + b"[]")
        taken.append(await _parse_numbers(text, opening.end(), end.start()))
        start = end.end()
    rest = b"".join((*kept, text[start:]))
    if sum(map(rest.count, (b",", b"[", b"{"))) > MAX_MEMBERS:
        message = f"a large JSON body may have at most {MAX_MEMBERS} members besides lists of numbers"
        raise InvalidParameterError(message)  # millions would fill the memory
    return rest, taken


def _find_end(text: bytes, depth: int, start: int) -> "re.Match[bytes] | None":
    """Find the `depth` brackets in a row that close the nested lists, with or without white space between them."""
    return re.compile(rb"\s*".join([rb"\]"] * depth)).search(text, start)


async def _parse_numbers(text: bytes, start: int, end: int) -> npt.NDArray[np.float64]:
    """Parse the numbers between the outermost brackets of a list, in pieces that end before a comma."""
    pieces = []
    while start < end:
        comma = text.find(b",", min(end, start + PIECE_BYTES), end)
        stop = end if comma < 0 else comma
        piece = text[start:stop].translate(None, b"[]")  # nested lists are flattened row by row
        try:
            pieces.append(np.array(from_json(b"[%b]" % piece, allow_inf_nan=False), np.float64))
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidParameterError("tensor data must be valid JSON numbers") from error
        start = stop + 1
        await asyncio.sleep(0)
    return np.concatenate(pieces) if pieces else np.empty(0)
