import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.files.checkpoint_errors import UnreadableCheckpointError
from models.files.safetensors_files import MAX_HEADER_BYTES, is_safetensors, read_safetensors, write_safetensors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.arange(4.0), "b": torch.ones(2, 2).half()}, {"said": "ü"})
    return path


def write(path: Path, header: object, body: bytes = bytes(24), length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)


def test_a_written_file_is_read_back_unchanged(path: Path) -> None:
    weights, metadata = read_safetensors(path)
    assert torch.equal(weights["a"], torch.arange(4.0))
    assert weights["b"].dtype == torch.float16
    assert metadata == {"said": "ü"}


def test_a_safetensors_file_is_recognised_by_its_first_bytes(path: Path, tmp_path: Path) -> None:
    assert is_safetensors(path)
    torch.save({}, tmp_path / "zip")
    torch.save({}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    (tmp_path / "short").write_bytes(b"{")
    assert not any(is_safetensors(tmp_path / name) for name in ("zip", "legacy", "short"))


def test_a_header_longer_than_the_file_is_refused(path: Path) -> None:
    for length in (2**63, 10**9, 200):
        write(path, {}, length=length)
        with pytest.raises(
            UnreadableCheckpointError, match=rf"^truncated: a header of {length} bytes in a file of 34$"
        ):
            read_safetensors(path)


def test_a_header_of_absurd_size_is_refused_before_it_is_read(path: Path) -> None:
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{")
        file.truncate(10**9)
    tracemalloc.start()
    with pytest.raises(UnreadableCheckpointError, match="its header is too large"):
        read_safetensors(path)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_a_truncated_file_is_refused_with_the_number_of_missing_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UnreadableCheckpointError, match=r"^truncated: 10 bytes of its weights are missing$"):
        read_safetensors(path)


def change(**fields: Any) -> Callable[[dict[str, Any]], object]:  # noqa: ANN401 - anything that a file may hold
    return lambda header: header["a"].update(fields)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (change(data_offsets=[0, 10**15]), "^truncated: 999999999999976 bytes of its weights are missing$"),
        (change(data_offsets=[0, 12]), "^its header is damaged$"),
        (change(data_offsets=[-4, 16]), "^its header is damaged$"),
        (change(data_offsets=[16, 0]), "^its header is damaged$"),
        (change(data_offsets=[8, 24]), "^its header is damaged$"),
        (change(data_offsets="ab"), "^its header is damaged$"),
        (change(shape=[10**12]), "^its header is damaged$"),
        (change(shape=[2**40, 2**40]), "^its header is damaged$"),
        (change(shape=[-4]), "^its header is damaged$"),
        (change(dtype="F1"), "^its header is damaged$"),
        (lambda header: header.update(__metadata__={"a": 1}), "^its header is damaged$"),
        (lambda header: header.update(a=[]), "^its header is damaged$"),
    ],
)
def test_a_header_that_does_not_match_the_file_is_refused(
    path: Path, damage: Callable[[dict[str, Any]], object], complaint: str
) -> None:
    header: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F16", "shape": [2, 2], "data_offsets": [16, 24]},
    }
    write(path, header)
    assert read_safetensors(path)[0].keys() == {"a", "b"}
    damage(header)
    write(path, header)
    with pytest.raises(UnreadableCheckpointError, match=complaint):
        read_safetensors(path)


@pytest.mark.parametrize("header", [b"{", b'{"a"}', b"{\xff}", b'{"a":' * 5000, b'{"a":' + b"[" * 5000])
def test_a_header_that_is_not_json_is_reported_as_damaged(path: Path, header: bytes) -> None:
    write(path, header)
    with pytest.raises(UnreadableCheckpointError, match=r"^its header is damaged$"):
        read_safetensors(path)
