"""Reading and writing single safetensors files, in pieces and with bounded memory.

Format: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape, begin and end within the
data), the data. Nothing is mapped: mapped pages count as memory of the process and turn read errors into signals.
This module owns the file format and must not know what the tensors mean.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from megatron.checkpoint.strided import Entry, memory_of, pread, row_blocks
from megatron.checkpoint.tensor_file import TensorReader
from megatron.utils.errors import CheckpointError
from megatron.utils.files import new_checksum, parse_json

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# For a write the kernel finds memory for all of it at once: where that is scattered, large ones take many times longer.
WRITE_BYTES = 128 * 2**10
_HEADER_LIMIT_BYTES = 100 * 10**6  # the limit of the reference implementation

Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class SafetensorsReader(TensorReader):
    """Reads rectangles of the tensors of one file, whose header is checked when it is opened."""

    def _find_tensors(self, descriptor: int) -> Mapping[str, Entry]:
        entries, self.metadata = _read_header(descriptor, self.path)
        return entries


class SafetensorsWriter:
    """Writes one file front to back, so that its checksum is ready with its last byte.

    The plan fixes the content beforehand. Tensors come in the order of `order`, each whole or as successive blocks of
    rows. Use it as a context manager; it does not remove a file that was left unfinished by an exception.
    """

    def __init__(self, path: Path, plan: Plan, metadata: Mapping[str, str] | None = None) -> None:
        """Create the file (it must not exist) and write its header. Raises CheckpointError as `write` does."""
        self.path = path
        # Wide elements first keeps every tensor aligned to its element size, which readers that map files rely on.
        self.order = sorted(plan, key=lambda name: -plan[name][0].itemsize)
        header = _make_header(self.order, plan, dict(metadata or {}))
        self.entries: dict[str, Entry] = {}
        offset = len(header)
        for name in self.order:
            self.entries[name] = Entry(*plan[name], offset=offset)
            offset += self.entries[name].size_bytes
        self.size_bytes = offset
        self._position = 0
        self._checksum = new_checksum()
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise cannot_write(path, error, self.size_bytes) from error
        try:
            preallocate(self._descriptor, path, self.size_bytes)
            self._append(memoryview(header))
        except BaseException:
            self._release()
            raise

    def write(self, name: str, rows: torch.Tensor) -> None:
        """Append the next rows of tensor `name` (all of it, or a block of its first dim).

        `rows` has the planned dtype, any strides, any device. Raises CheckpointError where the file system refuses.
        """
        entry = self.entries[name]
        assert rows.dtype == entry.dtype and tuple(rows.shape[1:]) == entry.shape[1:], (name, rows.dtype, rows.shape)
        assert entry.offset <= self._position, f"{name} comes before its turn"
        assert self._position + rows.numel() * entry.dtype.itemsize <= entry.offset + entry.size_bytes, name
        for block in row_blocks(rows.detach()):
            if block.numel():
                self._append(memory_of(block.contiguous().cpu()))

    def close(self) -> tuple[int, str]:
        """Have everything on the disk; returns the size in bytes and the checksum of the file."""
        assert self._position == self.size_bytes, f"{self.path}: {self._position} of {self.size_bytes} bytes written"
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise cannot_write(self.path, error, self.size_bytes) from error
        finally:
            self._release()
        return self.size_bytes, self._checksum.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._release()

    def _release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, data: memoryview) -> None:
        self._checksum.update(data)
        try:
            while data:
                written = os.write(self._descriptor, data[:WRITE_BYTES])
                self._position += written
                data = data[written:]
        except OSError as error:
            raise cannot_write(self.path, error, self.size_bytes) from error


def preallocate(descriptor: int, path: Path, size_bytes: int) -> None:
    """Have the room for a file set apart, so that a full disk shows at once. Raises CheckpointError."""
    try:
        if size_bytes:
            os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # the file system has no such thing
            raise cannot_write(path, error, size_bytes) from error


def cannot_write(path: Path, error: OSError, size_bytes: int) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be written ({error.strerror or error}); it needs {size_bytes:,} bytes: "
        "make room there or choose another folder."
    )


def _make_header(order: Sequence[str], plan: Plan, metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name in order:
        dtype, shape = plan[name]
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_header(descriptor: int, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file in the order of its data, and its metadata. Checks that they fill the file exactly."""
    size_bytes = os.fstat(descriptor).st_size
    if size_bytes < 8:
        raise CheckpointError(f"{path} has {size_bytes} bytes: a safetensors file has at least 8. Copy it again.")
    prefix = bytearray(8)
    pread(descriptor, path, 0, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    if length > _HEADER_LIMIT_BYTES:
        raise CheckpointError(f"{path} is not a safetensors file: its header would take {length:,} bytes.")
    if size_bytes < 8 + length:
        raise CheckpointError(
            f"{path} is truncated: it has {size_bytes:,} bytes, its header alone takes {8 + length:,}. Copy it again."
        )
    text = bytearray(length)
    pread(descriptor, path, 8, memoryview(text))
    try:
        header = parse_json(text.decode(), object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__", None) or {}
        entries = {name: _parse_entry(name, value, 8 + length) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: its header is damaged ({error}).") from error
    _check_coverage(entries, path, 8 + length, size_bytes)
    return entries, metadata


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} occurs twice")
    return result


def _parse_entry(name: str, value: Mapping[str, Any], data_offset: int) -> Entry:
    if value["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the dtype {value['dtype']}, which is not one of {', '.join(DTYPES)}")
    shape, (begin, end) = value["shape"], value["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in [*shape, begin, end]):
        raise ValueError(f"{name} has the shape {shape} at {begin}:{end}")
    entry = Entry(DTYPES[value["dtype"]], tuple(shape), data_offset + begin)
    if entry.size_bytes != end - begin:
        raise ValueError(f"{name} of shape {shape} needs {entry.size_bytes:,} bytes, not {end - begin:,}")
    return entry


def _check_coverage(entries: Mapping[str, Entry], path: Path, data_offset: int, size_bytes: int) -> None:
    position = data_offset
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size_bytes)):
        if entry.offset != position:
            raise CheckpointError(
                f"{path} is damaged: {name} begins at byte {entry.offset:,} where {position:,} was expected."
            )
        position += entry.size_bytes
    if position != size_bytes:
        what = "is truncated" if size_bytes < position else "is too long"
        raise CheckpointError(
            f"{path} {what}: it has {size_bytes:,} bytes, its header promises {position:,}. Copy it again."
        )
