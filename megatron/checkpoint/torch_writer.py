"""Writing files that `torch.load` reads, front to back and with bounded memory: see `torch_file` for the format."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch

from megatron.checkpoint.pickle_writer import write_pickle
from megatron.checkpoint.pickled import StorageRef, TensorRef
from megatron.checkpoint.safetensors_file import WRITE_BYTES, Plan, cannot_write, preallocate
from megatron.checkpoint.strided import contiguous_strides, memory_of, row_blocks

_ALIGNMENT_BYTES = 64  # of every storage, so that files can be mapped
_HEADER_BYTES = 30
_ZIP64_BYTES = 20  # of a header's extra field for a part that may need 64-bit sizes
_ZIP64_FROM_BYTES = 2**31

Content = Callable[[Mapping[str, TensorRef]], Any]


class TorchWriter:
    """Writes one file. The plan fixes the tensors beforehand, `content` the containers around them.

    Tensors come in the order of `order`, each whole or as successive blocks of rows. Use it as a context manager; it
    does not remove a file that was left unfinished by an exception.
    """

    def __init__(self, path: Path, plan: Plan, content: Content) -> None:
        """Create the file (it must not exist) and write all but the numbers. Raises CheckpointError as `write` does."""
        self.path, self.plan, self.order = path, plan, list(plan)
        references = {}
        for number, (name, (dtype, shape)) in enumerate(plan.items()):
            storage = StorageRef(str(number), dtype, math.prod(shape))
            references[name] = TensorRef(storage, dtype, 0, tuple(shape), contiguous_strides(shape))
        self._numbers = {name: number for number, name in enumerate(self.order)}
        self._size_bytes = sum(math.prod(shape) * dtype.itemsize for dtype, shape in plan.values())
        self._root = path.stem
        self._part: tuple[str, IO[bytes], int] | None = None  # the tensor being written, its file, the bytes missing
        self._file: IO[bytes] | None = None
        self._archive: zipfile.ZipFile | None = None
        try:
            self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by `close` and `__exit__`)
            preallocate(self._file.fileno(), path, self._size_bytes)
            self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
            for name, data in (("data.pkl", write_pickle(content(references))), ("byteorder", b"little")):
                self._archive.writestr(self._describe(name, len(data)), data)
        except OSError as error:
            self._release()
            raise cannot_write(path, error, self._size_bytes) from error

    def write(self, name: str, rows: torch.Tensor) -> None:
        """Append the next rows of tensor `name` (all of it, or a block of its first dim), in its planned dtype."""
        dtype, shape = self.plan[name]
        assert rows.dtype == dtype and tuple(rows.shape[1:]) == tuple(shape[1:]), (name, rows.dtype, rows.shape)
        try:
            part = self._open_part(name)
            for block in row_blocks(rows.detach()):
                if block.numel():
                    data = memory_of(block.contiguous().cpu())
                    for begin in range(0, len(data), WRITE_BYTES):
                        part.write(data[begin : begin + WRITE_BYTES])
        except OSError as error:
            raise cannot_write(self.path, error, self._size_bytes) from error
        assert self._part is not None
        left = self._part[2] - rows.numel() * dtype.itemsize
        assert left >= 0, name
        self._part = (name, part, left)
        if not left:
            self._close_part()

    def close(self) -> tuple[int, str]:
        """Have everything on the disk; returns the size in bytes (and "": its checksums are within)."""
        assert self._part is None and not self._numbers, f"{self.path}: {list(self._numbers)[:3]} are missing"
        assert self._file is not None and self._archive is not None
        try:
            self._archive.writestr(self._describe("version", 2), b"3\n")
            self._archive.close()
            os.ftruncate(self._file.fileno(), self._file.tell())
            os.fsync(self._file.fileno())
            size_bytes = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise cannot_write(self.path, error, self._size_bytes) from error
        finally:
            self._release()
        return size_bytes, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._release()

    def _open_part(self, name: str) -> IO[bytes]:
        if self._part is not None:
            assert self._part[0] == name, f"{name} comes before {self._part[0]} is whole"
            return self._part[1]
        assert self._archive is not None
        dtype, shape = self.plan[name]
        assert next(iter(self._numbers)) == name, f"{name} comes before its turn"
        number, size_bytes = self._numbers.pop(name), math.prod(shape) * dtype.itemsize
        part = self._archive.open(
            self._describe(f"data/{number}", size_bytes), "w", force_zip64=size_bytes >= _ZIP64_FROM_BYTES
        )
        self._part = (name, part, size_bytes)
        return part

    def _close_part(self) -> None:
        assert self._part is not None
        try:
            self._part[1].close()
        except OSError as error:
            raise cannot_write(self.path, error, self._size_bytes) from error
        self._part = None

    def _describe(self, name: str, size_bytes: int) -> zipfile.ZipInfo:
        """The header of a part, with as much padding as puts its bytes where they are aligned."""
        assert self._file is not None
        info = zipfile.ZipInfo(f"{self._root}/{name}")
        info.file_size = size_bytes
        header = _HEADER_BYTES + len(info.filename) + (_ZIP64_BYTES if size_bytes >= _ZIP64_FROM_BYTES else 0)
        padding = -(self._file.tell() + header + 4) % _ALIGNMENT_BYTES
        info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        return info

    def _release(self) -> None:
        if self._file is not None:
            if self._archive is not None:
                self._archive.fp = None  # else it would be completed when it is collected, whatever is missing
            self._file.close()
            self._file = None


def nested(references: Mapping[str, Any]) -> dict[str, Any]:
    """Values by their path ("a/b/c") as dictionaries within dictionaries."""
    tree: dict[str, Any] = {}
    for path, value in references.items():
        *parents, last = path.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        assert isinstance(place, dict) and last not in place, path
        place[last] = value
    return tree
