from pathlib import Path

import pytest

from service.bench.photos import Photo, read_photos
from service.errors import CommandError


def written(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(path.stem.encode())
    return path


def test_class_folders_give_the_labels_of_their_photographs(tmp_path: Path) -> None:
    for name in ("cat/a.jpg", "dog/b.PNG", "c.webp", "cat/notes.txt"):
        written(tmp_path / name)
    photos = read_photos([tmp_path], seed=0)
    assert sorted(photos, key=lambda photo: photo.data) == [Photo(b"a", "cat"), Photo(b"b", "dog"), Photo(b"c", None)]


def test_a_file_given_by_path_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    assert read_photos([written(tmp_path / "cat" / "photo")], seed=0) == [Photo(b"photo", None)]


def test_the_order_is_random_and_seeded(tmp_path: Path) -> None:
    for number in range(20):
        written(tmp_path / f"{number:02}.jpg")
    one, same, other = (read_photos([tmp_path], seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert sorted(photo.data for photo in one) == sorted(photo.data for photo in other)


def test_the_shipped_photographs_are_read_if_no_paths_are_given() -> None:
    assert len(read_photos([], seed=0)) >= 5


def test_a_folder_without_photographs_and_a_missing_file_raise_an_error(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no photographs in"):
        read_photos([tmp_path], seed=0)
    with pytest.raises(FileNotFoundError):
        read_photos([tmp_path / "none.jpg"], seed=0)
