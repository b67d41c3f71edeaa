"""Images and connections that cost a server far more than their sender, to test their effect on honest traffic.

    python -m tests.benchmarks.hostile NAME URL COUNT SECONDS

runs COUNT of them at a time against a server, from a process of its own.
"""

import asyncio
import io
import random
import resource
import struct
import sys
import time
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from urllib.parse import urlsplit

from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LONG_BUDGET = "/classify?budget_ms=60000&priority=-10"

Address = tuple[str, int]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def webp_of_one_colour() -> bytes:
    """49.8 million pixels in 34 bytes: a lossless WebP whose five prefix codes each have one symbol of no bits."""
    bits, length = 0, 0
    side = 7060 - 1
    one_symbol = (1, 1), (0, 1), (1, 1), (7, 8)  # a simple code, of one symbol, of eight bits, which is 7
    for value, width in ((side, 14), (side, 14), (0, 1), (0, 3), (0, 1), (0, 1), (0, 1), *(5 * one_symbol)):
        bits, length = bits | value << length, length + width
    data = b"\x2f" + bits.to_bytes((length + 7) // 8, "little")
    chunk = b"VP8L" + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def png_of_one_column() -> bytes:
    """49.9 million rows of one pixel."""
    header = struct.pack(">IIBBBBB", 1, 49_900_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(4 * 49_900_000), 1)
    return PNG_SIGNATURE + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def jpeg_of_fill_bytes() -> bytes:
    """A small JPEG with 19.9 MB of fill bytes, which mean nothing."""
    jpeg = encoded(Image.new("RGB", (64, 64)), "JPEG")
    return jpeg[:2] + b"\xff" * 19_900_000 + jpeg[2:]


def png_of_rationals() -> bytes:
    """A small PNG with an EXIF directory of two million numbers."""
    count = 2_000_000
    exif = struct.pack("<2sHIHHHII", b"II", 42, 8, 1, 0x9999, 5, count, 26) + struct.pack("<I", 0)
    png = encoded(Image.new("RGB", (64, 64)), "PNG")
    return png[:33] + png_chunk(b"eXIf", exif + struct.pack("<II", 1, 3) * count) + png[33:]


def gif_of_comments() -> bytes:
    """A small GIF with 19.9 MB of comments."""
    gif = encoded(Image.new("P", (64, 64)), "GIF")
    start = 13 + 3 * 2 ** ((gif[10] & 7) + 1) if gif[10] & 0x80 else 13
    comment = b"\x21\xfe" + (b"\xff" + b"c" * 255) * 77_700 + b"\x00"
    return gif[:start] + comment + gif[start:]


def noise(width: int, height: int, grain: int) -> Image.Image:
    """Draw random squares, which no encoder compresses well."""
    columns, rows = width // grain, height // grain
    small = Image.frombytes("RGB", (columns, rows), random.Random(0).randbytes(3 * columns * rows))
    return small.resize((width, height), Image.Resampling.NEAREST)


def progressive_jpeg() -> bytes:
    """48 megapixels in some 17 MB, refined scan by scan."""
    return encoded(noise(8000, 6000, 8), "JPEG", quality=88, progressive=True)


def phone_jpeg() -> bytes:
    """12 megapixels in some 2.6 MB."""
    return encoded(noise(4032, 3024, 10), "JPEG", quality=75)


IMAGES: dict[str, Callable[[], bytes]] = {
    "webp-of-one-colour": webp_of_one_colour,
    "png-of-one-column": png_of_one_column,
    "jpeg-of-fill-bytes": jpeg_of_fill_bytes,
    "png-of-rationals": png_of_rationals,
    "gif-of-comments": gif_of_comments,
    "progressive-jpeg": progressive_jpeg,
    "phone-jpeg": phone_jpeg,
}


def post(data: bytes) -> bytes:
    head = (
        f"POST {LONG_BUDGET} HTTP/1.1\r\nHost: server\r\nContent-Type: image/*\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def repeat(address: Address, request: bytes) -> None:
    """Post the same image again and again, on one connection for as long as it stays open."""
    reader, writer = await asyncio.open_connection(*address)
    with suppress(OSError, asyncio.IncompleteReadError):
        while True:
            writer.write(request)
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
            await reader.readexactly(length)
    writer.close()


async def pipeline_without_reading(address: Address) -> None:
    """Write 60,000 requests of 18 bytes and read no answers."""
    _, writer = await asyncio.open_connection(*address)
    writer.transport.pause_reading()  # type: ignore[attr-defined] # a socket's has it
    with suppress(OSError):
        writer.write(b"GET / HTTP/1.1\r\n\r\n" * 60_000)
        await writer.drain()
        await asyncio.sleep(5)
    writer.close()


async def drip(address: Address) -> None:
    """Announce an image and send one byte of it per second."""
    _, writer = await asyncio.open_connection(*address)
    with suppress(OSError):
        writer.write(post(bytes(100_000))[:-100_000])
        while True:
            writer.write(b"\xff")
            await writer.drain()
            await asyncio.sleep(1)
    writer.close()


async def stay_silent(address: Address) -> None:
    """Connect and send nothing."""
    reader, writer = await asyncio.open_connection(*address)
    with suppress(OSError):
        await reader.read()
    writer.close()


CONNECTIONS: dict[str, Callable[[Address], Awaitable[None]]] = {
    "pipeline-without-reading": pipeline_without_reading,
    "drip": drip,
    "silence": stay_silent,
}


async def play(name: str, url: str, count: int, seconds: float) -> None:
    """Run `count` attackers at a time; one that is disconnected starts again 0.1 s later."""
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    request = post(IMAGES[name]()) if name in IMAGES else b""
    print("ready", flush=True)
    ends_at = time.monotonic() + seconds

    async def one() -> None:
        while time.monotonic() < ends_at:
            with suppress(OSError):
                await (repeat(address, request) if request else CONNECTIONS[name](address))
            await asyncio.sleep(0.1)

    with suppress(TimeoutError):
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as tasks:
            for _ in range(count):
                tasks.create_task(one())


if __name__ == "__main__":
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    asyncio.run(play(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
