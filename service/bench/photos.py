"""The photographs to send, with their labels if they lie in class folders."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import models
from service.errors import CommandError

SHIPPED = Path(models.__file__).parent / "checkpoints" / "photographs"
SUFFIXES = frozenset((".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
MAX_PHOTOS = 2000  # photographs kept in memory


@dataclass(frozen=True, slots=True)
class Photo:
    """The bytes of a file, and the name of its class folder; None if there is none."""

    data: bytes
    label: str | None = None


def read_photos(paths: Sequence[Path], seed: int) -> list[Photo]:
    """Read photographs in random order, at most MAX_PHOTOS of them; without paths, those that ship.

    Raises:
        CommandError: there are no photographs.
        OSError: a file cannot be read.
    """
    files = [found for path in paths or (SHIPPED,) for found in _files(path)]
    if not files:
        raise CommandError(f"no photographs in {', '.join(map(str, paths))}")
    drawn = random.Random(seed).sample(files, min(MAX_PHOTOS, len(files)))
    return [Photo(file.read_bytes(), label) for file, label in drawn]


def _files(path: Path) -> Iterator[tuple[Path, str | None]]:
    if not path.is_dir():
        yield path, None
        return
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in SUFFIXES:
            yield file, file.parent.name if file.parent != path else None
