import logging
import os
from pathlib import Path

import pytest

from service.access.watched_files import ReloadedFiles, WatchedFiles
from service.errors import CommandError


def test_a_change_is_reported_until_the_files_were_read(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("before")
    files = WatchedFiles([path, other])
    assert not files.have_changed()
    other.write_text("now it is there")
    assert files.have_changed()
    assert files.have_changed()
    files.mark_read()
    assert not files.have_changed()
    os.utime(path, ns=(1, 1))
    assert files.have_changed()
    files.mark_read()
    path.chmod(0o640)  # which may make it readable
    assert files.have_changed()


def test_a_redirected_symbolic_link_is_a_change(tmp_path: Path) -> None:
    """Kubernetes replaces the files of a secret in this way."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "key").write_text(name)
        os.utime(tmp_path / name / "key", ns=(1, 1))
    link = tmp_path / "current"
    link.symlink_to("first")
    files = WatchedFiles([link / "key"])
    link.unlink()
    link.symlink_to("second")
    assert files.have_changed()


class Number:
    """A number that is read from a file again when it changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = ReloadedFiles([path], self.load, "number", logging.getLogger("numbers"))

    def load(self) -> str:
        self.value = int(self.path.read_text())
        return f"read {self.value}"


def test_each_problem_of_a_changed_file_is_logged_once_and_the_file_is_loaded_once_it_is_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "number"
    path.write_text("1")
    number = Number(path)
    for content in ("one", "one", None, "two", "three hundred", "22"):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        number.file.refresh()
        assert number.value == (22 if content == "22" else 1)
    number.file.refresh()
    kept = f"keeping the previous number: {path}: "
    invalid = "invalid literal for int() with base 10: "
    assert caplog.messages == [
        f"{kept}{invalid}'one'",
        f"{kept}No such file or directory",
        f"{kept}{invalid}'two'",
        f"{kept}{invalid}'three hundred'",
        "read 22",
    ]
    assert {record.name for record in caplog.records} == {"numbers"}


def test_a_file_that_cannot_be_loaded_at_first_is_an_error_of_the_command(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"number: No such file or directory$"):
        Number(tmp_path / "number")
    (tmp_path / "number").write_text("x")
    with pytest.raises(CommandError, match=r"number: invalid literal"):
        Number(tmp_path / "number")
