"""Reading strided rectangles of a file into tensors, in large requests and with bounded memory.

Every format that keeps its numbers as they are in memory is read through this: an `Entry` says where a tensor lies.
Nothing is mapped: mapped pages count as memory of the process and turn read errors into signals.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.utils.errors import CheckpointError

BLOCK_BYTES = 32 * 2**20  # of temporary memory: large enough that requests cost nothing against their data
REQUEST_BYTES = 2**30  # Linux returns at most 2 GiB less a page per call
_SCRATCH_BYTES = 2**20
_GAP_BYTES = 16 * 2**10  # reading through so much of what is not wanted is cheaper than another request

_memory = threading.local()


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `offset` in bytes from the beginning of the file.

    `strides` are in elements; None: the tensor is contiguous, in row-major order.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def element_strides(self) -> tuple[int, ...]:
        return contiguous_strides(self.shape) if self.strides is None else self.strides


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor of this shape in row-major order."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def read_entry(descriptor: int, path: Path, entry: Entry, slices: Sequence[slice] | None, out: torch.Tensor) -> None:
    """Fill `out` with the rectangle `slices` (None: everything) of a tensor, cast to the dtype of `out`.

    `out` has the rectangle's shape and may be strided or on another device. Slices are `begin:end` or
    `begin:end:step` with the end within the tensor. Raises CheckpointError where the file cannot be read.
    """
    strides = entry.element_strides
    slices = [slice(0, extent) for extent in entry.shape] if slices is None else slices
    steps = [part.step or 1 for part in slices]
    size = tuple(len(range(part.start, part.stop, step)) for part, step in zip(slices, steps, strict=True))
    assert tuple(out.shape) == size, (out.shape, size)
    assert all(0 <= part.start <= part.stop <= whole for part, whole in zip(slices, entry.shape, strict=True)), slices
    if out.numel():
        first = sum(part.start * stride for part, stride in zip(slices, strides, strict=True))
        taken = tuple(stride * step for stride, step in zip(strides, steps, strict=True))
        _Strided(descriptor, path, entry.dtype).read(entry.offset + first * entry.dtype.itemsize, taken, out.detach())


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor (at least one element), writable, without a copy."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # a dim of extent 1 may have kept a stride of its own
    return flat.view(torch.uint8).numpy().data


def row_blocks(tensor: torch.Tensor, itemsize: int = 0, columns: int = 0) -> Sequence[torch.Tensor]:
    """The tensor as blocks of rows that take at most BLOCK_BYTES (or one row) each."""
    if tensor.dim() == 0:
        return [tensor]
    row_bytes = (columns or math.prod(tensor.shape[1:])) * (itemsize or tensor.dtype.itemsize)
    return tensor.split(max(1, BLOCK_BYTES // max(row_bytes, 1)))


def pread(descriptor: int, path: Path, offset: int, memory: memoryview) -> None:
    """Fill `memory` from byte `offset` of a file; raises CheckpointError."""
    while memory:
        try:
            count = os.preadv(descriptor, [memory[:REQUEST_BYTES]], offset)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read at byte {offset:,} ({error.strerror}).") from error
        if count == 0:
            raise CheckpointError(f"{path} ended at byte {offset:,} while it was read: it was truncated meanwhile.")
        offset += count
        memory = memory[count:]


@dataclass(frozen=True)
class _Strided:
    """Reads parts of one tensor of a file whose elements are of `dtype`."""

    descriptor: int
    path: Path
    dtype: torch.dtype

    def read(self, offset: int, strides: tuple[int, ...], out: torch.Tensor) -> None:
        """Fill `out` from elements `strides` apart, the first of which begins at byte `offset`."""
        if out.dim() == 2 and strides[0] < strides[1] and out.shape[0] > 1:  # stored the other way round
            out, strides = out.t(), strides[::-1]
        if _is_run(out.shape, strides):
            self._read_run(offset, out)
        elif out.dim() == 1:
            self._read_columns(offset, strides[0], out.unsqueeze(1))
        elif out.dim() == 2 and (strides[1] == 1 or out.shape[1] == 1):
            self._read_columns(offset, strides[0], out)
        else:
            for index in range(out.shape[0]):
                self.read(offset + index * strides[0] * self.dtype.itemsize, strides[1:], out[index])

    def _read_run(self, offset: int, out: torch.Tensor) -> None:
        if out.dtype == self.dtype and out.is_contiguous() and out.device.type == "cpu":
            pread(self.descriptor, self.path, offset, memory_of(out))
            return
        for block in row_blocks(out, self.dtype.itemsize):
            buffer = _scratch(block.numel(), self.dtype).view(block.shape)
            pread(self.descriptor, self.path, offset, memory_of(buffer))
            block.copy_(buffer)
            offset += buffer.numel() * self.dtype.itemsize

    def _read_columns(self, offset: int, stride: int, out: torch.Tensor) -> None:
        """Rows that begin `stride` elements apart. What lies between them is read through where it is short."""
        width, itemsize = out.shape[1], self.dtype.itemsize
        through = (stride - width) * itemsize <= _GAP_BYTES
        span = stride if through else width  # elements that are read of each row
        for block in row_blocks(out, itemsize, span):
            rows = block.shape[0]
            buffer = _scratch(rows * span, self.dtype)
            if through:
                wanted = (rows - 1) * stride + width  # the file may end with the last row's part
                pread(self.descriptor, self.path, offset, memory_of(buffer[:wanted]))
            else:
                memory, part = memory_of(buffer), width * itemsize
                for index in range(rows):
                    begin = offset + index * stride * itemsize
                    pread(self.descriptor, self.path, begin, memory[index * part : (index + 1) * part])
            block.copy_(buffer.view(rows, span)[:, :width])
            offset += rows * stride * itemsize


def _scratch(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that is used anew by each read of a thread: fresh memory costs as much as the reading does."""
    size_bytes = numel * dtype.itemsize
    buffer: torch.Tensor | None = getattr(_memory, "buffer", None)
    if buffer is None or buffer.numel() < size_bytes:
        buffer = _memory.buffer = torch.empty(max(size_bytes, _SCRATCH_BYTES), dtype=torch.uint8)
    return buffer[:size_bytes].view(dtype)


def _is_run(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements lie one after the other in the file."""
    expected = contiguous_strides(shape)
    return all(extent == 1 or a == b for extent, a, b in zip(shape, strides, expected, strict=True))
