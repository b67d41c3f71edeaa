import os
from pathlib import Path

from service.access.watched_files import CHECK_S, WatchedFiles


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_change_is_reported_once_and_not_before_the_check_interval_has_passed(tmp_path: Path) -> None:
    path, other, clock = tmp_path / "a", tmp_path / "b", Clock()
    path.write_text("before")
    files = WatchedFiles([path, other], clock)
    other.write_text("now it is there")
    assert not files.have_changed(), "the check interval has not passed"
    clock.now += CHECK_S
    assert files.have_changed()
    clock.now += CHECK_S
    assert not files.have_changed()
    os.utime(path, ns=(1, 1))
    clock.now += CHECK_S
    assert files.have_changed()


def test_a_redirected_symbolic_link_is_a_change(tmp_path: Path) -> None:
    """Kubernetes replaces the files of a secret in this way."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "key").write_text(name)
        os.utime(tmp_path / name / "key", ns=(1, 1))
    link, clock = tmp_path / "current", Clock()
    link.symlink_to("first")
    files = WatchedFiles([link / "key"], clock)
    link.unlink()
    link.symlink_to("second")
    clock.now += CHECK_S
    assert files.have_changed()
