"""What the readers of single files of tensors have in common: they open a file, know where its tensors lie, and read
rectangles of them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from megatron.checkpoint.strided import Entry, read_entry
from megatron.utils.errors import CheckpointError
from megatron.utils.files import open_to_read


class TensorReader(ABC):
    """Reads rectangles of the tensors of one file. Use it as a context manager, or call `close`."""

    def __init__(self, path: Path) -> None:
        """Open the file and read all but its numbers; raises CheckpointError for a missing or damaged one."""
        self.path = path
        try:
            self._descriptor = open_to_read(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened ({error.strerror}).") from error
        try:
            self.entries = self._find_tensors(self._descriptor)
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _find_tensors(self, descriptor: int) -> Mapping[str, Entry]:
        """Where every tensor lies, by its name; raises CheckpointError."""

    def read(self, name: str, slices: Sequence[slice] | None, out: torch.Tensor) -> None:
        """Fill `out` with the rectangle `slices` (None: everything) of a tensor, cast to the dtype of `out`.

        `out` has the rectangle's shape and may be strided or on another device. Slices are `begin:end` or
        `begin:end:step`.
        """
        self.read_entry(self.entries[name], slices, out)

    def read_entry(self, entry: Entry, slices: Sequence[slice] | None, out: torch.Tensor) -> None:
        """The same for an entry that may see a stored tensor in another shape."""
        read_entry(self._descriptor, self.path, entry, slices, out)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
