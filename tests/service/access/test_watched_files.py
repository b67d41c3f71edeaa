import os
from pathlib import Path

from service.access.watched_files import WatchedFiles


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
