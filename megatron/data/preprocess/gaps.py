"""Which lines gave no document: kept in a file while the work goes on, so that memory stays bounded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron.utils.errors import DataError

_ENTRY = 3  # source, first line, last line


def open_kept(path: Path, kept_bytes: int) -> BinaryIO:
    """A file to append to, of which so many bytes are kept. Raises DataError if it has fewer."""
    file = open(path, "r+b" if kept_bytes else "wb")  # noqa: SIM115 - the caller closes it
    actual = file.seek(0, os.SEEK_END)
    if actual < kept_bytes:
        file.close()
        raise DataError(f"{path} is {actual:,} bytes, but {kept_bytes:,} were written; it was cut short")
    file.truncate(kept_bytes)
    file.seek(kept_bytes)
    return file


class GapFile:
    """`PREFIX.lines.partial`: i64 triples (source, first line, last line), in order."""

    def __init__(self, prefix: str, kept_entries: int = 0) -> None:
        self.path = Path(f"{prefix}.lines.partial")
        self._file = open_kept(self.path, kept_entries * _ENTRY * 8)
        self.num_entries = kept_entries

    def add(self, source: int, lines: NDArray[np.int64]) -> None:
        """Lines of a source, ascending, that gave no document."""
        if not lines.size:
            return
        breaks = np.flatnonzero(np.diff(lines) != 1)
        firsts = lines[np.concatenate(([0], breaks + 1))]
        lasts = lines[np.concatenate((breaks, [-1]))]
        self._file.write(np.stack([np.full_like(firsts, source), firsts, lasts], axis=1).astype("<i8").tobytes())
        self.num_entries += len(firsts)

    def ranges(self) -> dict[int, str]:
        """Per source its lines, as in `3-7,12`."""
        self.flush()
        entries = np.fromfile(self.path, "<i8", self.num_entries * _ENTRY).reshape(-1, _ENTRY)
        if not len(entries):
            return {}
        # Two entries that meet are one range, which was cut where one chunk ends.
        begins = np.ones(len(entries), dtype=bool)
        begins[1:] = (entries[1:, 0] != entries[:-1, 0]) | (entries[1:, 1] != entries[:-1, 2] + 1)
        first = np.flatnonzero(begins)
        last = np.concatenate((first[1:] - 1, [len(entries) - 1]))
        texts: dict[int, list[str]] = {}
        for source, low, high in zip(
            entries[first, 0].tolist(), entries[first, 1].tolist(), entries[last, 2].tolist(), strict=True
        ):
            texts.setdefault(source, []).append(str(low) if low == high else f"{low}-{high}")
        return {source: ",".join(parts) for source, parts in texts.items()}

    def flush(self) -> None:
        """Hand what was added to the operating system."""
        self._file.flush()

    def sync(self) -> None:
        """Have on the disk what was flushed. May be called from another thread."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Leave the file as it is."""
        self._file.close()
