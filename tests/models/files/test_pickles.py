"""Hostile pickles, most of them written opcode by opcode: see `pickletools.opcodes`."""

import io
import pickle
import tracemalloc
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import pytest

from models.files.checkpoint_errors import UnreadableCheckpointError
from models.files.pickles import MAX_PICKLE_BYTES, unpickle

BUILD, REDUCE, STOP = b"b", b"R", b"."


def call(module: str, name: str, argument: bytes) -> bytes:
    """Return a pickle that calls a function with one argument."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + argument + b"t" + REDUCE + STOP


def peak_bytes(pickled: bytes, complaint: str) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableCheckpointError, match=complaint):
            unpickle(io.BytesIO(pickled))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_consecutive_pickles_are_read_one_at_a_time() -> None:
    file = io.BytesIO(pickle.dumps({"a": [1, 2]}) + pickle.dumps("b", protocol=2) + b"rest")
    assert unpickle(file) == ({"a": [1, 2]}, {})
    assert unpickle(file) == ("b", {})
    assert file.read() == b"rest"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "mkdir"),
        ("builtins", "eval"),
        ("__builtin__", "getattr"),
        ("builtins", "bytearray"),
        ("collections", "namedtuple"),
        ("models.files.pickles", "unpickle"),
        ("torchvision.io", "read_file"),
    ],
)
def test_a_pickle_that_refers_to_code_is_refused(module: str, name: str) -> None:
    with pytest.raises(UnreadableCheckpointError, match="holds code, which is not run: it refers to"):
        unpickle(io.BytesIO(call(module, name, b"K\x07")))


def test_the_name_of_refused_code_is_escaped_and_shortened() -> None:
    with pytest.raises(UnreadableCheckpointError) as caught:
        unpickle(io.BytesIO(call("a\x1b[31m" + "x" * 999, "b", b"K\x07")))
    assert r"refers to a\x1b[31mxxx" in str(caught.value)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    "name", ["hub\nload", "_utils\n_rebuild_qtensor", "nn.modules.linear\nLinear", "serialization\nload", "\nload"]
)
def test_functions_of_torch_are_not_called(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"never read")
    module, _, function = name.partition("\n")
    argument = b"X" + len(str(path)).to_bytes(4, "little") + str(path).encode()
    content, _ = unpickle(io.BytesIO(call(f"torch.{module}".rstrip("."), function, argument)))
    assert type(content).__module__ == "models.files.pickles"


def test_a_pickle_cannot_set_attributes_of_our_functions() -> None:
    """A state of two parts sets attributes of the object that it is given to, such as a function's defaults."""
    changed = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x07\x00\x00\x00__doc__NstbK\x01."
    with pytest.raises(UnreadableCheckpointError, match="its pickle is invalid"):
        unpickle(io.BytesIO(changed))


def test_a_huge_memo_index_allocates_no_memory() -> None:
    remembered = b"\x80\x02Nr" + (2**30).to_bytes(4, "little") + STOP
    assert peak_bytes(remembered, "claims more than it holds") < 10 * 2**20
    assert peak_bytes(b"Np1073741824\n.", "claims more than it holds") < 10 * 2**20


@pytest.mark.parametrize("opcode", [b"\x8e", b"\x8d", b"\x96"], ids=["bytes", "text", "bytearray"])
def test_a_huge_claimed_length_allocates_no_memory(opcode: bytes) -> None:
    claimed = b"\x80\x05" + opcode + (2**33).to_bytes(8, "little") + b"short" + STOP
    assert peak_bytes(claimed, "truncated or damaged") < 20 * 2**20


@pytest.mark.parametrize("copies", [b"h\x00\x85R", b")Rh\x00b"], ids=["made of it", "given it as state"])
def test_a_large_dict_is_not_copied_repeatedly(copies: bytes) -> None:
    """Two hundred copies of twenty thousand entries, for about thirty bytes each."""
    entries = b"".join(b"M" + number.to_bytes(2, "little") + b"N" for number in range(20_000))
    one = b"}q\x00(" + entries + b"u0"
    copy = b"ccollections\nOrderedDict\n" + copies
    tracemalloc.start()
    try:
        with suppress(UnreadableCheckpointError):
            unpickle(io.BytesIO(b"\x80\x02" + one + b"](" + copy * 200 + b"e."))
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def test_deeply_nested_tuples_do_not_overflow_the_stack() -> None:
    nested = b"\x80\x02})" + b"\x85" * 300_000 + b"Ns."
    with pytest.raises(UnreadableCheckpointError, match="its pickle has more than"):
        unpickle(io.BytesIO(nested))


def test_a_pickle_beyond_the_size_limit_is_not_read_to_its_end() -> None:
    a_million = b"X" + (10**6).to_bytes(4, "little") + b"x" * 10**6 + b"0"
    file = io.BytesIO(b"\x80\x02" + a_million * (1 + MAX_PICKLE_BYTES // 10**6) + b"N" + STOP)
    with pytest.raises(UnreadableCheckpointError, match="truncated or damaged"):
        unpickle(file)
    assert file.tell() <= MAX_PICKLE_BYTES


def test_values_other_than_weights_do_not_make_a_pickle_unreadable() -> None:
    content, _ = unpickle(io.BytesIO(pickle.dumps(OrderedDict(a={1, 2}, b=1 + 2j, c=b"\xff"), protocol=2)))
    assert isinstance(content, dict)
    assert list(content) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "pickled", [b"", b"\x80", b"\x80\x02}", b"\x80\x02Q.", b"\x80\x02NQ.", b"\x80\x63N.", b"\x80\x02]Q."]
)
def test_an_invalid_pickle_is_reported_as_damaged(pickled: bytes) -> None:
    with pytest.raises(UnreadableCheckpointError, match="truncated or damaged"):
        unpickle(io.BytesIO(pickled))
