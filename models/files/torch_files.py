"""Files written by torch.save, read without torch.load: no code in them runs, and memory is bounded by what they hold.

A pickle describes the content. The numbers lie in records of a zip, or after the pickle in files from before torch 1.6.
The pickle is read first and its claims are checked; then the numbers of the weights that are needed are read.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from models.files.checkpoint_errors import UnreadableCheckpointError, printable_text
from models.files.pickles import MAX_PICKLE_BYTES, Storage, StoredWeight, is_natural, mapped_errors, unpickle

ZIP_START, PICKLE_START = b"PK\x03\x04", b"\x80"
LOCAL_HEADER_BYTES, ENCRYPTED = 30, 1
FOREIGN_BYTE_ORDER = "was written in big-endian byte order, which is not supported"
MAX_DIMENSIONS = 8
MAX_CLAIMED_PER_FILE_BYTE = (
    2  # claimed bytes allowed per byte of the file: shared weights are stored once and counted under each name
)
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# The published scripts evaluate 'state_dict_ema' (LV-ViT-S) and 'model' (DeiT-S, beside a 'model_ema').
WRAPPINGS = ("state_dict_ema", "state_dict", "model")


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a file that torch.save wrote.

    Raises:
        UnreadableCheckpointError: the file is truncated, damaged or not written by torch.save, holds code or no state
            dict, or claims more than it holds.
    """
    with path.open("rb") as file:
        start, size = file.read(len(ZIP_START)), file.seek(0, os.SEEK_END)
        file.seek(0)
        if start == ZIP_START:
            return _read_zip(file, size)
        if start.startswith(PICKLE_START):
            return _read_legacy(file, size)
    raise UnreadableCheckpointError("neither a safetensors nor a torch.save file" if size else "is empty")


def _read_zip(file: IO[bytes], size: int) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(file) as archive:
            records = _checked_records(archive, size)
            folder = next((name.partition("/")[0] for name in records if name.endswith("/data.pkl")), None)
            described = records.get(f"{folder}/data.pkl")
            if described is None:
                raise UnreadableCheckpointError("a zip file, but not from torch.save")
            if f"{folder}/constants.pkl" in records:
                raise UnreadableCheckpointError("holds code, which is not run: a TorchScript program")
            if described.file_size > MAX_PICKLE_BYTES:
                raise UnreadableCheckpointError("its pickle is too large")
            byte_order = records.get(f"{folder}/byteorder")
            if byte_order and archive.open(byte_order).read(len("big")) == b"big":
                raise UnreadableCheckpointError(FOREIGN_BYTE_ORDER)
            content, _ = unpickle(io.BytesIO(archive.read(described)))
            start = f"{folder}/data/"
            numbers = {name.removeprefix(start): record for name, record in records.items() if name.startswith(start)}
            sizes = {key: record.file_size for key, record in numbers.items()}
            return _build(content, sizes, lambda key, length: archive.open(numbers[key]).read(length), size)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OverflowError, ValueError, struct.error) as error:
        raise UnreadableCheckpointError("a zip file that is truncated or damaged") from error


def _checked_records(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Check the directory of a zip before anything is unpacked, and return its records: torch.save compresses nothing.

    Raises:
        UnreadableCheckpointError: a record is compressed or encrypted, overlaps another, or extends beyond the end of
            the file.
    """
    records = sorted(archive.infolist(), key=lambda record: record.header_offset)
    end = 0
    for record in records:
        is_stored = record.compress_type == zipfile.ZIP_STORED and record.file_size == record.compress_size
        if not is_stored or record.flag_bits & ENCRYPTED:
            raise UnreadableCheckpointError("a zip file with compressed records, which torch.save does not write")
        if record.header_offset < end:
            raise UnreadableCheckpointError("a zip file whose records overlap")
        end = record.header_offset + LOCAL_HEADER_BYTES + record.file_size
    if end > size:
        raise UnreadableCheckpointError("a zip file whose records exceed its size")
    return {record.filename: record for record in records}


def _read_legacy(file: IO[bytes], size: int) -> dict[str, Tensor]:
    if unpickle(file)[0] != LEGACY_MAGIC or unpickle(file)[0] != LEGACY_PROTOCOL:
        raise UnreadableCheckpointError("a pickle, but not from torch.save")
    with mapped_errors():
        machine: Any = unpickle(file)[0]
        if not machine["little_endian"]:
            raise UnreadableCheckpointError(FOREIGN_BYTE_ORDER)
        content, storages = unpickle(file)
        keys: Any = unpickle(file)[0]
        places, sizes = {}, {}
        for key in keys:  # the numbers of each are preceded by their count
            if key not in storages:
                raise UnreadableCheckpointError("unsupported storage type")
            (count,) = struct.unpack("<q", file.read(8))
            places[key], sizes[key] = file.tell(), count * storages[key].dtype.itemsize
            if not 0 <= sizes[key] <= size - file.tell():
                raise UnreadableCheckpointError("truncated, or its weights exceed its size")
            file.seek(sizes[key], os.SEEK_CUR)

    def read(key: str, length: int) -> bytes:
        file.seek(places[key])
        return file.read(length)

    return _build(content, sizes, read, size)


def _build(
    content: object, sizes: Mapping[str, int], read: Callable[[str, int], bytes], file_size: int
) -> dict[str, Tensor]:
    """Build the weights of the state dict in `content`; the other records of the file are not read.

    Args:
        content: the unpickled object.
        sizes: bytes of each record, by storage key.
        read: returns a number of bytes from the start of a record, or fewer if the record is shorter.
        file_size: size of the file in bytes.
    """
    described = _state_dict(content)
    claimed = sum(_claimed_bytes(name, stored, sizes) for name, stored in described.items())
    if claimed > MAX_CLAIMED_PER_FILE_BYTE * file_size:
        raise UnreadableCheckpointError(f"its weights claim {claimed} bytes, too many for a file of {file_size}")
    flat: dict[Storage, Tensor] = {}
    for storage in {stored.storage for stored in described.values()}:
        size = storage.length * storage.dtype.itemsize
        numbers = bytearray(read(storage.key, size) if size else b"")
        if len(numbers) != size:
            raise UnreadableCheckpointError("truncated: its weights are incomplete")
        # torch.frombuffer refuses an empty buffer.
        flat[storage] = (
            torch.frombuffer(numbers, dtype=storage.dtype) if numbers else torch.empty(0, dtype=storage.dtype)
        )
    return {
        name: flat[stored.storage].as_strided(stored.size, stored.stride, stored.offset)
        for name, stored in described.items()
    }


def _state_dict(content: object) -> dict[str, StoredWeight]:
    if isinstance(content, dict):
        content = next((content[key] for key in WRAPPINGS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not content:
        raise UnreadableCheckpointError(f"not a state dict: {'empty' if content == {} else 'other content'}")
    for name, value in content.items():
        if not isinstance(name, str):
            raise UnreadableCheckpointError("not a state dict: its keys must be strings")
        if not isinstance(value, StoredWeight):
            raise UnreadableCheckpointError(f"not a state dict: {printable_text(repr(name))} is not a weight")
    return content


def _claimed_bytes(name: str, stored: StoredWeight, sizes: Mapping[str, int]) -> int:
    """Check a pickle's description of a weight, and return the bytes that the weight takes.

    Raises:
        UnreadableCheckpointError: the storage is of no known kind, the weight has no shape or extends beyond its
            storage, or the storage extends beyond its record.
    """
    storage, offset, size, stride = stored
    if not isinstance(storage, Storage):
        raise UnreadableCheckpointError(f"the weight {printable_text(name)} has an unsupported storage type")
    is_shape = (
        isinstance(size, tuple)
        and isinstance(stride, tuple)
        and len(size) == len(stride) <= MAX_DIMENSIONS
        and all(map(is_natural, (offset, *size, *stride)))
    )
    if not is_shape:
        raise UnreadableCheckpointError(f"damaged: the weight {printable_text(name)} has no valid shape")
    end = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) + 1 if all(size) else 0
    if end > storage.length or storage.length * storage.dtype.itemsize > sizes.get(storage.key, 0):
        raise UnreadableCheckpointError(f"the weight {printable_text(name)} exceeds the data in the file")
    return int(math.prod(size)) * storage.dtype.itemsize
