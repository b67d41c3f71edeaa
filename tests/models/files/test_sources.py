import subprocess
import sys
from pathlib import Path

import pytest

from models.files.checkpoint_errors import UnreadableCheckpointError
from models.files.sources import SHIPPED_FOLDER, bare_name, find_checkpoint, shipped_names

MICRO, SMALL = "supervit-micro-cifar10", "supervit-small-caltech101"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a folder that holds none of the shipped checkpoints."""
    monkeypatch.chdir(tmp_path)


def test_a_shipped_checkpoint_is_found_by_its_name() -> None:
    """The pictures, cards and logs in its folder are not listed as checkpoints."""
    assert find_checkpoint(MICRO) == SHIPPED_FOLDER / f"{MICRO}.safetensors"
    assert shipped_names() == (MICRO, SMALL)


def test_a_local_file_takes_precedence_over_a_shipped_checkpoint_and_a_folder_does_not() -> None:
    Path(SMALL).mkdir()
    assert find_checkpoint(SMALL) == SHIPPED_FOLDER / f"{SMALL}.safetensors"
    Path(MICRO).touch()
    assert find_checkpoint(MICRO) == Path(MICRO)


def test_an_unknown_name_lists_the_shipped_checkpoints() -> None:
    with pytest.raises(UnreadableCheckpointError, match=rf"^macro: no such file, .*choose from {MICRO}, {SMALL}$"):
        find_checkpoint("macro")
    with pytest.raises(UnreadableCheckpointError, match=r"^runs/macro: no such file$"):
        find_checkpoint("runs/macro")
    with pytest.raises(UnreadableCheckpointError, match=r"^macro\.pth: no such file$"):
        find_checkpoint(Path("macro.pth"))


@pytest.mark.parametrize("url", ["http://host/a.pth", "https://host/a", "S3://bucket/a", "hf://owner/name"])
def test_a_url_is_refused_with_the_supported_alternatives(url: str) -> None:
    taken = (
        r"a URL is not supported; use a path, the name of a checkpoint that ships, or hf-hub:owner/name\[@revision\]$"
    )
    for name in (url, Path(url)):  # a Path collapses the two slashes
        with pytest.raises(UnreadableCheckpointError, match=taken):
            find_checkpoint(name)


@pytest.mark.parametrize(
    "name", ["hf-hub:", "hf-hub:name", "hf-hub:owner/name/file", "hf-hub:owner/name@", "hf-hub:ö/n"]
)
def test_a_repository_must_be_named_with_its_owner(name: str) -> None:
    with pytest.raises(UnreadableCheckpointError, match=r"must be named hf-hub:owner/name\[@revision\]$"):
        find_checkpoint(name)


@pytest.mark.parametrize("name", ["", "\0", "x" * 5000, "a\nb"])
def test_an_invalid_name_is_a_short_one_line_error(name: str) -> None:
    with pytest.raises(UnreadableCheckpointError) as caught:
        find_checkpoint(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_path_that_cannot_be_accessed_is_named_in_the_error(tmp_path: Path) -> None:
    """The name is too long; a folder without permissions would not do, as root may enter it."""
    with pytest.raises(UnreadableCheckpointError, match=r"a+\.safetensors: cannot be read: File name too long"):
        find_checkpoint(tmp_path / f"{'a' * 300}.safetensors")


def test_bare_name_drops_owner_and_revision() -> None:
    assert bare_name("micro") == "micro"
    assert bare_name("hf-hub:owner/net-1.0@refs/pr/2") == "net-1.0"


def test_the_hub_client_is_imported_only_for_hub_names(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.touch()
    code = (
        "import sys; from models.files.sources import find_checkpoint, shipped_names\n"
        "for name in (sys.argv[1], *shipped_names()): find_checkpoint(name)\n"
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=Path(__file__).parents[3])
