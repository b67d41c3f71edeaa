"""The photographs that are sent, and what they show where class folders say so."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import models
from service.errors import CommandError

SHIPPED = Path(models.__file__).parent / "checkpoints" / "photographs"
SUFFIXES = frozenset((".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
MOST = 2000  # that are kept in memory


@dataclass(frozen=True, slots=True)
class Photo:
    """A file, and the name of its class folder; None where it lies in none."""

    data: bytes
    label: str | None = None


def read_photos(paths: Sequence[Path], seed: int) -> list[Photo]:
    """Read photographs in random order, MOST of them at most; those that ship where no paths are given.

    Raises:
        CommandError: there are none.
        OSError: one cannot be read.
    """
    files = [found for path in paths or (SHIPPED,) for found in _files(path)]
    if not files:
        raise CommandError(f"there are no photographs in {', '.join(map(str, paths))}")
    drawn = random.Random(seed).sample(files, min(MOST, len(files)))
    return [Photo(file.read_bytes(), label) for file, label in drawn]


def _files(path: Path) -> Iterator[tuple[Path, str | None]]:
    if not path.is_dir():
        yield path, None
        return
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in SUFFIXES:
            yield file, file.parent.name if file.parent != path else None
