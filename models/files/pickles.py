"""Read the pickles of state dicts without running anything that they name.

Content other than weights, such as the options and the optimizer of a run, is skipped. Weights are returned as
descriptions of where their numbers lie; `torch_files` reads the numbers.
"""

import io
import pickle
import pickletools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import torch

from models.files.checkpoint_errors import UnreadableCheckpointError, printable_text

MAX_PICKLE_BYTES = 4 * 2**20  # thousands of weights take a few hundred kilobytes; unpickling grows them thirtyfold
MEMO_WRITES = ("PUT", "BINPUT", "LONG_BINPUT")
MAX_TUPLES = 50_000  # about five per weight; 200,000 nested ones would overflow the interpreter's stack

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}

# Errors that Python and torch.load were seen to raise on bytes that are damaged or were never a pickle.
UNPICKLING_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.PickleError,
    struct.error,
)


class _StorageType(NamedTuple):
    dtype: torch.dtype


class Storage(NamedTuple):
    """An array of numbers in the file, as the pickle describes it."""

    key: str
    dtype: torch.dtype
    length: int


class StoredWeight(NamedTuple):
    """A weight as the pickle describes it, unchecked."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


class _Weights(dict[Any, Any]):
    """Stand-in for OrderedDict; its constructor takes no content, or a pickle could copy one large dict repeatedly."""

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, _: object) -> None:
        """Discard the state: the versions of modules."""


class _Ignored:
    """Stand-in for everything but weights, such as the options of a run: it accepts everything and stores nothing."""

    __slots__ = ()

    def __new__(cls, *_: object, **__: object) -> "_Ignored":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass

    def __setitem__(self, _: object, __: object) -> None:
        pass


class _RebuildTensor:
    """Stand-in for torch's functions that make a tensor; not a function, whose attributes a pickle might set."""

    __slots__ = ()

    def __call__(self, storage: object, offset: object, size: object, stride: object, *_: object) -> StoredWeight:
        return StoredWeight(storage, offset, size, stride)


class _RebuildParameter:
    """Stand-in for torch's functions that make a parameter of a tensor."""

    __slots__ = ()

    def __call__(self, tensor: object, *_: object) -> object:
        return tensor


def _stand_in(module: str, name: str) -> object:
    """Return the stand-in for a class or function that a pickle names.

    Raises:
        UnreadableCheckpointError: no stand-in is known, so the name might be code.
    """
    module = "builtins" if module == "__builtin__" else module  # the name in Python 2 and in pickle protocol 2
    if (module, name) == ("collections", "OrderedDict"):
        return _Weights
    if module == "torch" and name in DTYPES:
        return _StorageType(DTYPES[name])
    if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
        return _RebuildTensor()
    if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
        return _RebuildParameter()
    # The published files keep their options in a Namespace; others keep a measurement as a NumPy number.
    if module.partition(".")[0] in ("torch", "numpy") or (module, name) in {
        ("argparse", "Namespace"),
        ("builtins", "set"),
        ("builtins", "complex"),
        ("_codecs", "encode"),
        ("collections", "Counter"),
        ("collections", "defaultdict"),
    }:
        return _Ignored
    raise UnreadableCheckpointError(f"holds code, which is not run: it refers to {printable_text(f'{module}.{name}')}")


class _Unpickler(pickle.Unpickler):
    """Builds values and descriptions of weights; calls nothing but the stand-ins above."""

    def __init__(self, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled), encoding="utf-8")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - as the base class has it
        return _stand_in(module, name)

    def persistent_load(self, pid: Any) -> object:  # noqa: ANN401 - whatever the file says
        if pid[0] != "storage":
            raise UnreadableCheckpointError("holds code, which is not run: the source of a module")
        _, kind, key, _, length, *view = pid
        is_known = isinstance(kind, _StorageType) and isinstance(key, str) and view in ([], [None])
        if not is_known or not is_natural(length):
            return _Ignored()
        storage = self.storages[key] = Storage(key, kind.dtype, length)
        return storage


def unpickle(file: IO[bytes]) -> tuple[object, dict[str, Storage]]:
    """Read the pickle at the position of `file`, and leave `file` at the end of the pickle.

    Returns:
        The content, with a StoredWeight for each weight, and the storages that the pickle names, by key.

    Raises:
        UnreadableCheckpointError: the pickle is truncated or damaged, or names what might be code.
    """
    # Python's unpickler allocates memory for as many memo entries as a pickle announces, and it hashes nested tuples to
    # any depth, so both are checked first.
    start = file.tell()
    pickled = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    num_tuples = 0
    with mapped_errors():
        for opcode, argument, position in pickletools.genops(pickled):
            num_tuples += opcode.name.startswith("TUPLE")
            if num_tuples > MAX_TUPLES:
                raise UnreadableCheckpointError(f"its pickle has more than {MAX_TUPLES} tuples")
            if opcode.name in MEMO_WRITES and not (isinstance(argument, int) and argument <= (position or 0)):
                raise UnreadableCheckpointError("damaged: its pickle claims more than it holds")
        file.seek(start + pickled.tell())
        unpickler = _Unpickler(pickled.getvalue()[: pickled.tell()])
        return unpickler.load(), unpickler.storages


@contextmanager
def mapped_errors() -> Iterator[None]:
    """Turn any error of UNPICKLING_ERRORS in a block into an UnreadableCheckpointError."""
    try:
        yield
    except UNPICKLING_ERRORS as error:
        raise UnreadableCheckpointError("truncated or damaged: its pickle is invalid") from error


def is_natural(value: object) -> bool:
    """Return whether a value is a whole number of at least 0."""
    return type(value) is int and value >= 0
