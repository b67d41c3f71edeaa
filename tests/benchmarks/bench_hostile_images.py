"""What small files made to be expensive cost the server that decodes them, one fresh process for each.

python -m tests.benchmarks.bench_hostile_images

Prints for each file its outcome, CPU seconds, the peak memory above that of an idle process, and the longest time for
which another thread of the process, such as the event loop's, stood still.
"""

import io
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from models.supervit import DEIT_SMALL
from service.decoding.images import decode_image
from service.errors import ServiceError
from service.settings import Settings

MAX_PIXELS: int = Settings.model_fields["max_image_pixels"].default
BODY = 19_900_000  # bytes, just below the server's body limit
TICK_S = 0.001
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def main() -> None:
    """Decode the files named on the command line, or all of them."""
    if sys.argv[1:] == ["--measure"]:
        cpu_s, peak_mb, stall_s, outcome = measure(sys.stdin.buffer.read())
        print(f"{cpu_s:7.3f} {peak_mb:6.0f} {1000 * stall_s:9.1f}  {outcome}")
        return
    names = sys.argv[1:] or list(HOSTILE)
    print(f"{'':24} {'bytes':>10} {'CPU s':>7} {'MB':>6} {'stall ms':>9}  outcome")
    for name in names:
        data = HOSTILE[name]()
        command = [sys.executable, "-m", "tests.benchmarks.bench_hostile_images", "--measure"]
        measured = subprocess.run(command, input=data, capture_output=True, check=True)
        print(f"{name:24} {len(data):10} {measured.stdout.decode().strip()}", flush=True)


def measure(data: bytes) -> tuple[float, float, float, str]:
    """Decode once, beside a thread that reads the clock every millisecond."""
    decode = partial(decode_image, config=DEIT_SMALL, max_pixels=MAX_PIXELS)
    warm = io.BytesIO()
    Image.new("RGB", (300, 300)).save(warm, "JPEG")
    decode(warm.getvalue())
    done, stalls = threading.Event(), [0.0]

    def watch() -> None:
        last = time.perf_counter()
        while not done.wait(TICK_S):
            now = time.perf_counter()
            stalls.append(now - last - TICK_S)
            last = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    time.sleep(0.02)
    idle_kb, started_s = peak_kb(), time.process_time()
    try:
        outcome = str(tuple(decode(data).shape))
    except ServiceError as error:
        outcome = f"{error.code}: {error.message}"
    cpu_s = time.process_time() - started_s
    done.set()
    watcher.join()
    return cpu_s, (peak_kb() - idle_kb) / 1000, max(stalls), outcome


def peak_kb() -> int:
    """Return the peak resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def chunk(kind: bytes, body: bytes) -> bytes:
    """Make a PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *extra: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """Make a PNG of one colour, with chunks before its pixels."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = bytes(1 + (width * channels * depth + 7) // 8)
    deflate = zlib.compressobj(9)
    rows = max(1, 1_000_000 // len(row))
    full, rest = divmod(height, rows)
    pixels = b"".join([*(deflate.compress(row * rows) for _ in range(full)), deflate.compress(row * rest)])
    pixels += deflate.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return PNG_SIGNATURE + header + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    """Encode a picture."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def one_colour(image_format: str, width: int, height: int, mode: str = "RGB", **options: object) -> bytes:
    """Encode a picture of one colour."""
    return saved(Image.new(mode, (width, height)), image_format, **options)


def fill_bytes() -> bytes:
    """A JPEG with fill bytes, which may stand before any marker."""
    jpeg = one_colour("JPEG", 64, 64)
    return jpeg[:2] + b"\xff" * BODY + jpeg[2:]


def junk_bytes() -> bytes:
    """A JPEG with bytes between its segments that belong to no marker."""
    jpeg = one_colour("JPEG", 64, 64)
    return jpeg[:20] + b"\x01" * BODY + jpeg[20:]


def empty_segments() -> bytes:
    """A JPEG with many empty comments."""
    jpeg = one_colour("JPEG", 64, 64)
    return jpeg[:2] + b"\xff\xfe\x00\x02" * (BODY // 4) + jpeg[2:]


def rationals(count: int) -> bytes:
    """EXIF data whose orientation is `count` fractions."""
    entries = struct.pack(">HHII", 0x0112, 5, count, 38) + struct.pack(">HHIHH", 0x0128, 3, 1, 2, 0)
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", 2) + entries + bytes(4) + struct.pack(">II", 1, 3) * count


def comments(block: bytes) -> bytes:
    """A GIF with one comment of small blocks."""
    gif = one_colour("GIF", 64, 64)
    start = gif.index(b",", 13)
    return gif[:start] + b"!\xfe" + block * (BODY // len(block)) + b"\0" + gif[start:]


HOSTILE: dict[str, Callable[[], bytes]] = {
    "webp_one_colour": lambda: one_colour("WEBP", 7060, 7060, lossless=True),
    "webp_lossy": lambda: one_colour("WEBP", 7060, 7060),
    "png_column": lambda: png(1, 49_900_000),
    "png_row": lambda: png(49_900_000, 1),
    "png_rgba": lambda: png(7060, 7060, colour=6),
    "png_16_bit": lambda: png(7060, 7060, depth=16),
    "png_exif": lambda: png(64, 64, chunk(b"eXIf", rationals(2_000_000))),
    "png_chunks": lambda: png(64, 64, chunk(b"tEXt", b"") * (BODY // 12)),
    "jpeg_fill_bytes": fill_bytes,
    "jpeg_junk_bytes": junk_bytes,
    "jpeg_segments": empty_segments,
    "jpeg_50mp": lambda: one_colour("JPEG", 8160, 6120),
    "jpeg_200mp": lambda: one_colour("JPEG", 16_320, 12_240, quality=30),
    "jpeg_progressive_50mp": lambda: one_colour("JPEG", 8160, 6120, progressive=True),
    "jpeg_column": lambda: one_colour("JPEG", 760, 65_500, subsampling=0),
    "gif_comments": lambda: comments(b"\xff" + bytes(255)),
    "gif_tiny_comments": lambda: comments(b"\x01x"),
    "gif_50mp": lambda: one_colour("GIF", 7060, 7060, "P"),
    "bmp_50mp": lambda: one_colour("BMP", 12_600, 12_600, "1")[:BODY],
    "tiff_50mp": lambda: one_colour("TIFF", 7060, 7060, compression="tiff_deflate"),
    "avif_50mp": lambda: one_colour("AVIF", 7060, 7060, speed=10),
}


if __name__ == "__main__":
    main()
