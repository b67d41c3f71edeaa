"""Files that torch.save wrote, and files that lie about what they hold."""

import io
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.files import torch_files
from models.files.checkpoint_errors import UnreadableCheckpointError
from models.files.pickles import MAX_PICKLE_BYTES
from models.files.torch_files import read_torch_file


@dataclass(frozen=True)
class Numbers:
    """A storage, as a pickle describes it."""

    count: int
    kind: type = torch.FloatStorage
    key: str = "0"


@dataclass(frozen=True)
class Claim:
    """A weight, as a pickle describes it."""

    numbers: Numbers
    size: Any
    stride: Any
    offset: Any = 0

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (self.numbers, self.offset, self.size, self.stride, False, OrderedDict())


class Writer(pickle.Pickler):
    """Pickles as torch.save does."""

    def persistent_id(self, value: object) -> tuple[object, ...] | None:
        return ("storage", value.kind, value.key, "cpu", value.count) if isinstance(value, Numbers) else None


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    Writer(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def write_zip(path: Path, records: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return path


def write_claims(path: Path, content: object, numbers: bytes) -> Path:
    return write_zip(path, {"data.pkl": pickled(content), "version": b"3", "data/0": numbers})


def write_legacy(path: Path, content: object, count: int, numbers: bytes) -> Path:
    machine = {"protocol_version": 1001, "little_endian": True}
    opening = b"".join(
        pickle.dumps(part, 2) for part in (torch_files.LEGACY_MAGIC, torch_files.LEGACY_PROTOCOL, machine)
    )
    path.write_bytes(
        opening + pickled(content) + pickle.dumps(["0"], 2) + count.to_bytes(8, "little", signed=True) + numbers
    )
    return path


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    square = torch.randn(4, 6)
    return {
        "float": square,
        "transposed": square.T,
        "part": square[1:3, ::2],
        "half": torch.randn(3).half(),
        "bfloat16": torch.randn(3).bfloat16(),
        "double": torch.randn(2).double(),
        "long": torch.tensor(3),
        "bool": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "nothing": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.randn(2)),
    }


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_weights_are_read_as_torch_load_reads_them(tmp_path: Path, weights: dict[str, Tensor], is_zip: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save(OrderedDict(weights), path, _use_new_zipfile_serialization=is_zip)
    read, expected = read_torch_file(path), torch.load(path, weights_only=True)
    assert read.keys() == weights.keys()
    for name, weight in read.items():
        assert weight.dtype == expected[name].dtype
        assert weight.stride() == expected[name].stride()
        assert torch.equal(weight, expected[name])


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_only_the_weights_of_a_training_state_are_read(
    tmp_path: Path, is_zip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {
        "model": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": Namespace(size=torch.Size([3]), device=torch.device("cpu"), dtype=torch.float16, words={"a"}),
        "complex": torch.ones(9, dtype=torch.complex64),
    }
    path = tmp_path / "state.pth"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    made: list[int] = []
    frombuffer = torch.frombuffer

    def count(buffer: bytearray, dtype: torch.dtype) -> Tensor:
        made.append(len(buffer))
        return frombuffer(buffer, dtype=dtype)

    monkeypatch.setattr(torch, "frombuffer", count)
    read = read_torch_file(path)
    assert read.keys() == {"weight", "bias"}
    assert torch.equal(read["weight"], layer.weight)
    assert sorted(made) == [12, 36]


def test_weights_that_share_a_storage_are_read_once(tmp_path: Path) -> None:
    shared = torch.randn(50, 50)
    torch.save({"a": shared, "b": shared}, tmp_path / "tied.pth")
    read = read_torch_file(tmp_path / "tied.pth")
    assert read["a"].data_ptr() == read["b"].data_ptr()
    assert torch.equal(read["b"], shared)


def fail(*_: object, **__: object) -> None:
    raise AssertionError("something was read")


def complain_unread(path: Path, complaint: str) -> None:
    """Check that a zip file is refused by its directory alone, with none of its records read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "open", fail)
        complain(path, complaint)


def complain(path: Path, complaint: str) -> None:
    with pytest.raises(UnreadableCheckpointError, match=complaint):
        read_torch_file(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_bomb_is_refused_by_its_directory_alone(tmp_path: Path, compression: int) -> None:
    records = {"data.pkl": pickled({}), "data/0": bytes(50_000_000)}
    path = write_zip(tmp_path / "bomb.pth", records, compression)
    assert path.stat().st_size < 100_000
    complain_unread(path, "compressed records, which torch.save does not write")


def edited_directory(path: Path, name: str, **fields: int) -> Path:
    """Change the entry of a record in the directory of a zip file, and leave the record unchanged."""
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    while data[entry + 46 :][: len(name)] != name.encode():
        entry = data.index(b"PK\x01\x02", entry + 1)
    places = {"compressed": 20, "size": 24, "offset": 42}
    for field, value in fields.items():
        data[entry + places[field] : entry + places[field] + 4] = value.to_bytes(4, "little")
    path.write_bytes(data)
    return path


def test_records_that_claim_more_than_the_file_holds_are_refused(tmp_path: Path) -> None:
    path = write_claims(tmp_path / "claims.pth", {}, bytes(100))
    complain_unread(edited_directory(path, "archive/data/0", size=10**9, compressed=10**9), "exceed its size")
    complain_unread(edited_directory(path, "archive/data/0", size=10**9, compressed=100), "compressed records")


def test_overlapping_records_are_refused(tmp_path: Path) -> None:
    """A few bytes could otherwise be counted as the content of many records."""
    path = write_zip(tmp_path / "over.pth", {"data.pkl": pickled({}), "data/0": bytes(500), "data/1": bytes(400)})
    with zipfile.ZipFile(path) as archive:
        first = archive.getinfo("archive/data/0").header_offset
    complain_unread(edited_directory(path, "archive/data/1", offset=first + 50), "a zip file whose records overlap")


def test_a_pickle_beyond_the_size_limit_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "long.pth", {"data.pkl": bytes(MAX_PICKLE_BYTES + 1)})
    complain_unread(path, "its pickle is too large")


@pytest.mark.parametrize(
    ("claim", "complaint"),
    [
        (Claim(Numbers(10**12), (10**12,), (1,)), "w exceeds the data in the file"),
        (Claim(Numbers(4), (10**12,), (1,)), "w exceeds the data in the file"),
        (Claim(Numbers(4), (2, 2), (4, 1)), "w exceeds the data in the file"),
        (Claim(Numbers(4), (2, 2), (2, 1), 1), "w exceeds the data in the file"),
        (Claim(Numbers(4, key="1"), (4,), (1,)), "w exceeds the data in the file"),
        (Claim(Numbers(4, torch.DoubleStorage), (4,), (1,)), "w exceeds the data in the file"),
        (Claim(Numbers(4), (10**9, 4), (0, 1)), r"its weights claim 16000000000 bytes, too many for a file of \d+$"),
        (Claim(Numbers(8, torch.HalfStorage), (10**9,), (0,)), "its weights claim 2000000000 bytes"),
        (Claim(Numbers(4), (2,), (-1,), 3), "damaged: the weight w has no valid shape"),
        (Claim(Numbers(4), (-1,), (1,)), "damaged: the weight w has no valid shape"),
        (Claim(Numbers(4), (True,), (1,)), "damaged: the weight w has no valid shape"),
        (Claim(Numbers(4), (2, 2), (1,)), "damaged: the weight w has no valid shape"),
        (Claim(Numbers(4), "ab", (1, 1)), "damaged: the weight w has no valid shape"),
        (Claim(Numbers(4), (1,) * 9, (1,) * 9), "damaged: the weight w has no valid shape"),
        (Claim(Numbers(-4), (0,), (1,)), "the weight w has an unsupported storage type"),
        (Claim(Numbers(4, torch.QUInt8Storage), (1,), (1,)), "the weight w has an unsupported storage type"),
    ],
)
def test_a_weight_that_exceeds_the_data_or_has_no_valid_shape_is_refused(
    tmp_path: Path, claim: Claim, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "frombuffer", fail)
    complain(write_claims(tmp_path / "claims.pth", {"w": claim}, bytes(16)), complaint)
    legacy = write_legacy(tmp_path / "legacy.pth", {"w": claim}, claim.numbers.count, bytes(16))
    complain(legacy, f"{complaint}|exceed its size|unsupported storage type")


def test_many_weights_of_one_storage_are_refused(tmp_path: Path) -> None:
    """In half precision, each would be converted separately."""
    claims = {f"w{index}": Claim(Numbers(5000, torch.HalfStorage), (5000,), (1,)) for index in range(30)}
    complain(write_claims(tmp_path / "claims.pth", claims, bytes(10_000)), "its weights claim 300000 bytes")


@pytest.mark.parametrize("count", [10**15, 2**62, -1, 5])
def test_a_legacy_file_whose_storage_claims_more_than_it_holds_is_refused(tmp_path: Path, count: int) -> None:
    claim = Claim(Numbers(4), (4,), (1,))
    assert read_torch_file(write_legacy(tmp_path / "whole.pth", {"w": claim}, 4, bytes(16)))["w"].tolist() == [0] * 4
    complain(write_legacy(tmp_path / "claims.pth", {"w": claim}, count, bytes(16)), "exceed its size")


def save_script(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"archive/{name}", b"")


@pytest.mark.parametrize(
    ("write", "complaint"),
    [
        (Path.touch, "^is empty$"),
        (lambda path: path.write_bytes(b"GIF89a" * 9), "^neither a safetensors nor a torch.save file$"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "^a zip file that is truncated or damaged$"),
        (lambda path: write_zip(path, {"a/b/data.pkl": b"", "x": b""}), "^a zip file, but not from torch.save$"),
        (
            lambda path: path.write_bytes(pickle.dumps(torch_files.LEGACY_PROTOCOL, 2)),
            "^a pickle, but not from torch.save$",
        ),
        (
            lambda path: write_zip(path, {"data.pkl": pickled({}), "byteorder": b"big"}),
            "^was written in big-endian byte order, which is not supported$",
        ),
        (lambda path: write_claims(path, [1], b""), "^not a state dict: other content$"),
        (lambda path: write_claims(path, {}, b""), "^not a state dict: empty$"),
        (lambda path: write_claims(path, {(): 1}, b""), "^not a state dict: its keys must be strings$"),
        (lambda path: write_claims(path, {"a\n": 1}, b""), r"^not a state dict: 'a\\n' is not a weight$"),
        (save_script, "^holds code, which is not run: a TorchScript program$"),
    ],
)
def test_every_unsupported_file_gets_an_error_that_names_the_cause(
    tmp_path: Path, write: Callable[[Path], object], complaint: str
) -> None:
    write(tmp_path / "file.pth")
    complain(tmp_path / "file.pth", complaint)


def test_damaged_weights_are_detected_by_their_checksum(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.full((8,), 7.0)}, path)
    data = path.read_bytes()
    place = data.index(torch.full((8,), 7.0).numpy().tobytes())
    path.write_bytes(data[:place] + b"\x01" + data[place + 1 :])
    complain(path, "^a zip file that is truncated or damaged$")
