"""How fast `decode_image` is, and how well it agrees with the evaluation transform, over a folder of images.

python -m tests.benchmarks.bench_images --photos DIR --checkpoint PATH
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from models.checkpoint import Checkpoint, load_checkpoint
from models.data.images import evaluation_transform, normalise, to_rgb
from models.subnetwork import SubNetwork
from service.decoding.images import decode_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
MAX_PIXELS = 100_000_000
ROUNDS = 5
PASSES = 5
BATCH_SIZE = 50

Decode = Callable[[bytes], Tensor]


def main() -> None:
    """Read the images, then print times, throughput and agreement."""
    options = parse()
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(options.checkpoint)
    photos = read_photos(options.photos, options.limit, options.megapixels)
    transform = evaluation_transform(checkpoint.config)

    def reference(data: bytes) -> Tensor:
        with Image.open(io.BytesIO(data)) as image:
            return transform(to_rgb(image))

    def ours(data: bytes) -> Tensor:
        return decode_image(data, checkpoint.config, MAX_PIXELS)

    print(f"{len(photos)} images, {checkpoint.name}, {checkpoint.config.image_side} px")
    print_speed(photos, {"reference": reference, "ours": ours})
    print_agreement([reference(data) for data in photos], [ours(data) for data in photos], checkpoint)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of images, or of folders of them")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100, help="most images, evenly spread over the folder")
    parser.add_argument("--megapixels", type=float, help="enlarge every image to this size, as a JPEG, beforehand")
    return parser.parse_args()


def read_photos(folder: Path, limit: int, megapixels: float | None) -> list[bytes]:
    """Read up to `limit` images, enlarged if `megapixels` is given."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"{folder}: no images")
    photos = [path.read_bytes() for path in paths[:: max(1, len(paths) // limit)][:limit]]
    return photos if megapixels is None else [enlarge(data, megapixels) for data in photos]


def enlarge(data: bytes, megapixels: float) -> bytes:
    """Scale an image to `megapixels` and encode it as a JPEG."""
    with Image.open(io.BytesIO(data)) as image:
        factor = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
        size = (round(image.width * factor), round(image.height * factor))
        buffer = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def print_speed(photos: list[bytes], decoders: dict[str, Decode]) -> None:
    """Print the median time per image, and the images per second of thread pools with one and two threads."""
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for data in photos:
        for name, decode in decoders.items():  # in turns, so that a busy moment of the machine affects both
            times[name].append(time_image(decode, data))
    print(f"{'':12} {'ms per image':>13} {'1 thread':>13} {'2 threads':>13}")
    for name, decode in decoders.items():
        one, two = (pool_throughput(decode, photos, threads) for threads in (1, 2))
        print(f"{name:12} {1e3 * statistics.median(times[name]):13.3f} {one:11.1f}/s {two:11.1f}/s")


def time_image(decode: Decode, data: bytes) -> float:
    """Decode once to warm up and then ROUNDS times; return the median seconds."""
    times = []
    for _ in range(1 + ROUNDS):
        started_at = time.perf_counter()
        decode(data)
        times.append(time.perf_counter() - started_at)
    return statistics.median(times[1:])


def pool_throughput(decode: Decode, photos: list[bytes], threads: int) -> float:
    """Decode all images PASSES times in a thread pool; return the images per second of the median pass."""
    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PASSES):
            started_at = time.perf_counter()
            list(pool.map(decode, photos))
            times.append(time.perf_counter() - started_at)
    return len(photos) / statistics.median(times)


def print_agreement(expected: list[Tensor], got: list[Tensor], checkpoint: Checkpoint) -> None:
    """Print how much the pixels differ, and how often each sub-network predicts the same class for both."""
    pairs = zip(expected, got, strict=True)
    differences = torch.stack([(one.short() - other.short()).abs() for one, other in pairs])
    print(f"difference of the pixels: {differences.float().mean():.4f} levels on average, {differences.max()} at most")
    for subnetwork in checkpoint.profile.by_subnetwork:
        same = classes(expected, checkpoint, subnetwork) == classes(got, checkpoint, subnetwork)
        print(f"top-1 agreement at {subnetwork}: {100 * same.float().mean():.1f} %")


def classes(images: list[Tensor], checkpoint: Checkpoint, subnetwork: SubNetwork) -> Tensor:
    """Return the (M,) classes that a sub-network predicts."""
    batches = [torch.stack(images[start : start + BATCH_SIZE]) for start in range(0, len(images), BATCH_SIZE)]
    with torch.inference_mode():
        logits = [checkpoint.model(normalise(batch, checkpoint.config), subnetwork) for batch in batches]
    return torch.cat(logits).argmax(dim=1)


if __name__ == "__main__":
    main()
