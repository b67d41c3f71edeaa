"""Mutated images, forms, JSON, headers and queries against a real server: none may cause a 5xx, a hang or lost memory.

    python -m tests.benchmarks.bench_fuzz PHOTOGRAPHS --requests 100000 --serve --checkpoint supervit-micro-cifar10

A request depends on the seed and its number alone: `--first N --requests 1` sends request N again.
"""

import argparse
import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, urlsplit

import uvloop
from PIL import Image

from tests.benchmarks.bench_live import read_pictures, resident_mb, server

CLIENTS = 8
HANG_S = 2.0
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
BOUNDARY = b"----------boundary"
QUERIES = ("budget_ms", "budget_gflops", "patch_grid", "keep_rate", "priority", "top_k", "min_confidence", "x")
VALUES = (
    "",
    "0",
    "-1",
    "1",
    "5",
    "14",
    "0.5",
    "1e308",
    "1e-308",
    "nan",
    "inf",
    "ü",
    "\0",
    "%",
    "9" * 400,
    "true",
    "[]",
)
HEADERS = ("Content-Encoding", "Origin", "Expect", "X-Request-ID", "Accept", "Transfer-Encoding", "Range", "Host")


def encodings(data: bytes) -> list[bytes]:
    """Encode a photograph in every format, small, in colour and in grey."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture.thumbnail((96, 96))
    found = []
    for kind in FORMATS:
        for image in (picture, picture.convert("L")):
            buffer = io.BytesIO()
            image.save(buffer, kind)
            found.append(buffer.getvalue())
    return found


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return the data with a few bytes, lengths or pieces changed."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0 if changed:
                changed[at % len(changed)] = rng.randrange(256)
            case 1 if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            case 2:
                del changed[at:]
            case 3:
                changed[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
            case 4:
                changed[at : at + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1"))
            case 5:
                start = rng.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + rng.randrange(256)]
    return bytes(changed)


def form(parts: Sequence[tuple[bytes, bytes]], rng: random.Random) -> bytes:
    body = b""
    for name, data in parts:
        kind = rng.choice((b"\r\nContent-Type: image/jpeg", b"\r\nContent-Type: ;;", b""))
        file_name = rng.choice((b'; filename="a.jpg"', b"; filename*=UTF-8''%ff", b""))
        body += b"--" + BOUNDARY + b'\r\nContent-Disposition: form-data; name="' + name + b'"' + file_name
        body += kind + b"\r\n\r\n" + data + b"\r\n"
    return body + b"--" + BOUNDARY + b"--\r\n"


def body_of(image: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Make a content type and a body from an image."""
    match rng.randrange(8):
        case 0:
            parts = [(rng.choice((b"file", b"image", b"budget_ms", b"\xff")), image) for _ in range(rng.randrange(4))]
            if rng.random() < 0.5:
                parts.append((rng.choice(QUERIES).encode(), rng.choice(VALUES).encode()))
            return f"multipart/form-data; boundary={BOUNDARY.decode()}", form(parts, rng)
        case 1:
            parts = [(b"file", image)]
            return f"multipart/form-data; boundary={BOUNDARY.decode()}", mutated(form(parts, rng), rng)
        case 2:
            text = base64.b64encode(image).decode()
            content: dict[str, object] = {
                "image": rng.choice((text, f"data:image/png;base64,{text}", "data:,", 7, None, [text]))
            }
            content |= {rng.choice(QUERIES): rng.choice((rng.choice(VALUES), 3, None, [], 1e308))}
            encoded = json.dumps(content).encode()
            return "application/json", mutated(encoded, rng) if rng.random() < 0.5 else encoded
        case 3:
            return rng.choice(("text/plain", "image/", "multipart/form-data", "application/json; charset=x", "")), image
        case _:
            return rng.choice(("image/jpeg", "application/octet-stream", "image/*")), image


def request_of(seeds: Sequence[bytes], seed: int, number: int) -> bytes:
    """Make a request, whose head is valid HTTP."""
    rng = random.Random(f"{seed}/{number}")
    image = rng.choice(seeds)
    kind, body = body_of(mutated(image, rng) if rng.random() < 0.9 else image, rng)
    names = rng.sample(QUERIES, rng.choice((0, 0, 1, 2)))
    query = "&".join(f"{name}={quote(rng.choice(VALUES))}" for name in names)
    if "budget_ms" not in names:
        query += "&budget_ms=60000"
    path = rng.choice(("/classify",) * 8 + ("/decide", "/subnetworks", "/nothing"))
    headers = [f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Host: 127.0.0.1"]
    if rng.random() < 0.1:
        value = rng.choice(("gzip", "identity", "http://elsewhere", "a" * 300, "\xe9", "bytes=0-1"))
        headers.append(f"{rng.choice(HEADERS)}: {value}")
    return f"POST {path}?{query} HTTP/1.1\r\n".encode() + "\r\n".join(headers).encode("latin-1") + b"\r\n\r\n" + body


async def send(address: tuple[str, int], request: bytes) -> int:
    """Send a request on a connection of its own; return the status, or 0 if the connection closed without one."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(request)
        writer.write_eof()
        line = await reader.readline()
        while line.startswith(b"HTTP/1.1 100"):
            await reader.readline()
            line = await reader.readline()
        await reader.read()
        return int(line.split()[1]) if line else 0
    except OSError:
        return 0
    finally:
        writer.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of photographs to mutate")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further options of supervit serve")
    options = parser.parse_args()
    seeds = [each for picture in read_pictures(options.images, 4) for each in encodings(picture.data)]
    numbers = iter(range(options.first, options.first + options.requests))
    statuses: Counter[int] = Counter()
    bad: list[str] = []
    async with server("level", options.serve) as (url, pid):
        parts = urlsplit(url)
        address = (parts.hostname or "", parts.port or 0)

        async def client() -> None:
            for number in numbers:
                started_at = time.monotonic()
                status = await send(address, request_of(seeds, options.seed, number))
                took_s = time.monotonic() - started_at
                statuses[status] += 1
                if status >= 500 or took_s > HANG_S:
                    bad.append(f"request {number}: {status} after {took_s:.2f} s")
                    print(bad[-1], flush=True)
                if sum(statuses.values()) % 10_000 == 0:
                    print(f"{sum(statuses.values())} requests, {resident_mb(pid):.0f} MB", flush=True)

        before = resident_mb(pid)
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        after = resident_mb(pid)
    print(f"statuses {dict(sorted(statuses.items()))}; {before:.0f} MB before, {after:.0f} MB after; {len(bad)} bad")


if __name__ == "__main__":
    uvloop.run(main())
