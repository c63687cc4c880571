"""Reading the files that `torch.save` writes: where every tensor lies in them, without running what they say.

Since PyTorch 1.6 such a file is a zip archive, not compressed: `NAME/data.pkl` holds the objects, `NAME/data/KEY` the
numbers of each storage. Before, it was five pickles and then the storages one after the other. Both are read.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from megatron.checkpoint.pickled import StorageRef, TensorRef, UnreadableError, read_pickle
from megatron.checkpoint.strided import BLOCK_BYTES, Entry
from megatron.checkpoint.tensor_file import TensorReader
from megatron.utils.errors import CheckpointError

SUFFIXES = (".bin", ".pt", ".pth")

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LOCAL_HEADER_BYTES = 30
_PICKLE_LIMIT_BYTES = 2**30
_CONTAINER_LIMIT = 10**6
_DEPTH_LIMIT = 64


class TorchReader(TensorReader):
    """The tensors of one file by their path in its nested containers, joined by "/"; `content` is all of it.

    Opening a hostile file raises CheckpointError as opening a damaged one does.
    """

    def _find_tensors(self, descriptor: int) -> Mapping[str, Entry]:
        self.content, entries = _read(descriptor, self.path)
        return entries


def is_damaged(path: Path) -> bool:
    """Whether the checksum of a part of a zip archive is wrong (an older file has none). Raises CheckpointError."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(_checksum(archive, record) != record.CRC for record in archive.infolist())
    except zipfile.BadZipFile:
        return _is_zip(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error


def _checksum(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> int:
    checksum, offset, left = 0, _data_offset(archive.fp, record), record.file_size
    assert archive.fp is not None
    archive.fp.seek(offset)
    while left:
        block = archive.fp.read(min(left, BLOCK_BYTES))
        if not block:
            return -1
        checksum = zlib.crc32(block, checksum)
        left -= len(block)
    return checksum


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _read(descriptor: int, path: Path) -> tuple[Any, dict[str, Entry]]:
    """The content, and where each tensor in it is."""
    with open(descriptor, "rb", closefd=False) as file:
        try:
            if file.read(4) == b"PK\x03\x04":
                content, places = _read_archive(file)
            else:
                file.seek(0)
                content, places = _read_legacy(file, os.fstat(descriptor).st_size)
            return content, dict(_entries(content, places, path))
        except UnreadableError as error:
            raise CheckpointError(
                f"{path} is not read: {error}. It was not run; use it only if you trust its source."
            ) from error
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole file of torch.save ({error}). Copy it again.") from error


def _read_archive(file: IO[bytes]) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The content, and of each storage's key its offset in the file and its bytes."""
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: record for record in archive.infolist()}
        if len(records) != len(archive.infolist()):
            raise ValueError("a part occurs twice")
        (pickled,) = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1] or [""]
        if not pickled:
            raise ValueError("it has no data.pkl")
        root = pickled.removesuffix("data.pkl")
        if records.get(f"{root}byteorder") and _content(file, records[f"{root}byteorder"]) != b"little":
            raise ValueError("its numbers are in big-endian order")
        content = read_pickle(io.BytesIO(_content(file, records[pickled])))
        prefix = f"{root}data/"
        places = {
            name.removeprefix(prefix): (_data_offset(file, record), record.file_size)
            for name, record in records.items()
            if name.startswith(prefix)
        }
    return content, places


def _content(file: IO[bytes], record: zipfile.ZipInfo) -> bytes:
    offset = _data_offset(file, record)
    if record.file_size > _PICKLE_LIMIT_BYTES:
        raise ValueError(f"{record.filename} takes {record.file_size:,} bytes")
    file.seek(offset)
    data = file.read(record.file_size)
    if zlib.crc32(data) != record.CRC:
        raise ValueError(f"the checksum of {record.filename} is wrong")
    return data


def _data_offset(file: IO[bytes] | None, record: zipfile.ZipInfo) -> int:
    """Where the bytes of a part begin; the directory tells only where the header before them does."""
    assert file is not None
    if record.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{record.filename} is compressed")
    file.seek(record.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    if len(header) != _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"{record.filename} is not where the directory says")
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return record.header_offset + _LOCAL_HEADER_BYTES + name + extra


def _read_legacy(file: IO[bytes], size_bytes: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Magic number, version, machine, content and the storages' keys; then of each its length and its numbers."""
    if read_pickle(file) != _LEGACY_MAGIC or read_pickle(file) != 1001:
        raise ValueError("it begins as no file of torch.save does")
    machine = read_pickle(file)
    if not (isinstance(machine, dict) and machine.get("little_endian", True)):
        raise ValueError("its numbers are in big-endian order")
    content, keys = read_pickle(file), read_pickle(file)
    if not isinstance(keys, list):
        raise ValueError("it has no list of storages")
    itemsizes = {ref.storage.key: ref.dtype.itemsize for ref in _tensors(content)}
    places = {}
    for key in map(str, keys):
        numel = int.from_bytes(file.read(8), "little")
        places[key] = (file.tell(), numel * itemsizes.get(key, 1))
        file.seek(places[key][0] + places[key][1])
        if file.tell() > size_bytes:
            raise ValueError(f"it ends within storage {key}")
    return content, places


def _tensors(content: Any) -> Iterator[TensorRef]:
    for _, value in _leaves("", content):
        if isinstance(value, TensorRef):
            yield value


def _entries(content: Any, places: Mapping[str, tuple[int, int]], path: Path) -> Iterator[tuple[str, Entry]]:
    for name, value in _leaves("", content):
        if isinstance(value, TensorRef):
            place = places.get(value.storage.key)
            needed = _needed_bytes(value.storage, value.dtype)
            if place is None or place[1] < needed:
                raise CheckpointError(
                    f"{path} is damaged: the numbers of {name} ({needed:,} bytes) are "
                    f"{'missing' if place is None else f'cut to {place[1]:,}'}. Copy it again."
                )
            offset = place[0] + value.offset * value.dtype.itemsize
            yield name, Entry(value.dtype, value.shape, offset, value.strides)


def _needed_bytes(storage: StorageRef, dtype: torch.dtype) -> int:
    return storage.numel * (1 if storage.dtype is None else storage.dtype.itemsize)


def _leaves(prefix: str, content: Any) -> Iterator[tuple[str, Any]]:
    """Everything that is no container, by its path.

    Containers may be shared or hold themselves, so that a small file speaks of endlessly many: their number is limited.
    """
    left = _CONTAINER_LIMIT
    waiting = [(prefix, content, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        if not isinstance(value, (dict, list, tuple)):
            yield path, value
            continue
        left -= 1 + len(value)
        if left < 0 or depth > _DEPTH_LIMIT:
            raise UnreadableError(f"its containers hold more than {_CONTAINER_LIMIT:,} items or are nested too deep")
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        waiting += [(f"{path}/{key}" if path else str(key), item, depth + 1) for key, item in reversed(items)]
