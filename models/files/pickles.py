"""Pickles of state dicts, read without running anything that they name.

What is no weight, such as the options and the optimizer of a run, is passed over. Weights come out as descriptions of
where their numbers lie; see `torch_files`, which reads those.
"""

import io
import pickle
import pickletools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import torch

from models.files.checkpoint_errors import UnreadableCheckpointError, shown

MAX_PICKLE_BYTES = 4 * 2**20  # of thousands of weights, a few hundred kilobytes; unpickled, it grows thirtyfold
MEMO_WRITES = ("PUT", "BINPUT", "LONG_BINPUT")
MAX_TUPLES = 50_000  # some five to a weight; 200,000 within one another would overflow the stack of the interpreter

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

# What was seen to be raised, by Python or by torch.load, over bytes that are damaged or were never a pickle.
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
    """Numbers in the file, as a pickle claims them to be."""

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
    """Stands for an OrderedDict; takes no content at once, or one large dict could be copied ever again."""

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, _: object) -> None:
        """Forget the versions of modules."""


class _Ignored:
    """Stands for whatever is no weight, such as the options of a run: it takes everything and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *_: object, **__: object) -> "_Ignored":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass

    def __setitem__(self, _: object, __: object) -> None:
        pass


class _RebuildTensor:
    """Stands for torch's functions that make a tensor; no function of ours, which a pickle might set attributes of."""

    __slots__ = ()

    def __call__(self, storage: object, offset: object, size: object, stride: object, *_: object) -> StoredWeight:
        return StoredWeight(storage, offset, size, stride)


class _RebuildParameter:
    """Stands for torch's functions that make a parameter of a tensor."""

    __slots__ = ()

    def __call__(self, tensor: object, *_: object) -> object:
        return tensor


def _stand_in(module: str, name: str) -> object:
    """Give what is used in place of a class or function that a pickle names.

    Raises:
        UnreadableCheckpointError: it might run something.
    """
    module = "builtins" if module == "__builtin__" else module  # as Python 2 called it, and protocol 2 does
    if (module, name) == ("collections", "OrderedDict"):
        return _Weights
    if module == "torch" and name in DTYPES:
        return _StorageType(DTYPES[name])
    if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
        return _RebuildTensor()
    if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
        return _RebuildParameter()
    # The published files keep their options in a Namespace, others a measurement as a number of numpy's.
    if module.partition(".")[0] in ("torch", "numpy") or (module, name) in {
        ("argparse", "Namespace"),
        ("builtins", "set"),
        ("builtins", "complex"),
        ("_codecs", "encode"),
        ("collections", "Counter"),
        ("collections", "defaultdict"),
    }:
        return _Ignored
    raise UnreadableCheckpointError(f"holds code, which is not run: it asks for {shown(f'{module}.{name}')}")


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
    """Read the pickle that begins here, and leave `file` behind it.

    Returns:
        What it holds, with a StoredWeight for each weight, and the storages that it names, by their keys.

    Raises:
        UnreadableCheckpointError: it is truncated or damaged, or names what might run.
    """
    # Python's unpickler makes room for as many values as a pickle says that it will remember, and it hashes tuples
    # within tuples without end: both is looked at first.
    start = file.tell()
    pickled = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    num_tuples = 0
    with followed():
        for opcode, argument, position in pickletools.genops(pickled):
            num_tuples += opcode.name.startswith("TUPLE")
            if num_tuples > MAX_TUPLES:
                raise UnreadableCheckpointError("its description of the weights is of absurd size")
            if opcode.name in MEMO_WRITES and not (isinstance(argument, int) and argument <= (position or 0)):
                raise UnreadableCheckpointError("damaged: its description of the weights claims more than it holds")
        file.seek(start + pickled.tell())
        unpickler = _Unpickler(pickled.getvalue()[: pickled.tell()])
        return unpickler.load(), unpickler.storages


@contextmanager
def followed() -> Iterator[None]:
    """Have whatever goes wrong while a description is read end in an UnreadableCheckpointError."""
    try:
        yield
    except UNPICKLING_ERRORS as error:
        raise UnreadableCheckpointError("truncated or damaged: what it says of its weights makes no sense") from error


def is_natural(value: object) -> bool:
    """Tell whether a value is a whole number from 0 on."""
    return type(value) is int and value >= 0
