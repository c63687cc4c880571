"""Writing a pair, so that it is whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from array import array
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron.data.indexed.format import CHUNK, CODES, HEADER, MAGIC, MAX_SEQUENCE, VERSION, clean_prefix, pair_paths
from megatron.data.indexed.reader import IndexedReader
from megatron.utils.errors import DataError
from megatron.utils.files import fsync_folder

_COPY_BYTES = 1 << 22
_NO_COPY_IN_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY}


@dataclass(frozen=True)
class Written:
    """How much a writer has written: what it needs to go on."""

    sequences: int
    tokens: int


class IndexedWriter:
    """Writes a `.bin/.idx` pair, streaming, in the memory of its buffers however many sequences there are.

    (Documents of several sequences take 8 bytes each.) The files carry temporary names until `close` renames them, so
    no reader ever sees half a pair. Used as a context manager, an exception leaves nothing behind. Raises DataError
    for tokens that the dtype cannot hold.

    `ending` is what temporary names end in; by default it is this writer's alone, since two runs that were given the
    same prefix by mistake must not mix their tokens. Whoever names it sees to that, and can go on, after `leave`, with
    another writer that is told what was `written` (pairs whose documents are one sequence each).
    """

    def __init__(
        self, prefix: str | Path, dtype: np.dtype | str, *, ending: str | None = None, written: Written | None = None
    ) -> None:
        self.prefix = clean_prefix(prefix)
        self.dtype = np.dtype(dtype)
        assert self.dtype in CODES, f"{self.dtype} cannot hold tokens"
        self.bin_path, self.idx_path = pair_paths(self.prefix)
        for path in (self.bin_path, self.idx_path):
            if path.is_dir():
                raise DataError(f"{path} is a folder, where a file of the pair is to be; choose another name")
        ending = f".{secrets.token_hex(4)}.partial" if ending is None else ending
        self.partial_bin = self.bin_path.with_name(self.bin_path.name + ending)
        self.partial_idx = self.idx_path.with_name(self.idx_path.name + ending)
        self.num_tokens = 0 if written is None else written.tokens
        self._num_sequences = 0 if written is None else written.sequences
        self._num_documents = self._num_sequences
        self._ends: array[int] | None = None  # of documents, once one of them is not one sequence
        self._sha256 = hashlib.sha256()
        self._finished = False
        with ExitStack() as stack:
            self._bin = stack.enter_context(self._open(self.partial_bin, written))
            self._idx = stack.enter_context(self._open(self.partial_idx, written))
            if written is None:
                self._idx.write(bytes(HEADER.size))  # what it holds is known at the end
            else:
                self._go_on(written)
            self._files: ExitStack | None = stack.pop_all()

    @staticmethod
    def _open(path: Path, written: Written | None) -> BinaryIO:
        return open(path, "w+b" if written is None else "r+b", buffering=1 << 20)

    def _go_on(self, written: Written) -> None:
        lengths = (written.tokens * self.dtype.itemsize, HEADER.size + 4 * written.sequences)
        for file, length in zip((self._bin, self._idx), lengths, strict=True):
            actual = file.seek(0, os.SEEK_END)
            if actual < length:
                raise DataError(f"{file.name} is {actual:,} bytes, but {length:,} were written; it was cut short")
            file.truncate(length)
        self._bin.seek(0)
        while block := self._bin.read(_COPY_BYTES):
            self._sha256.update(block)
        self._idx.seek(0, os.SEEK_END)

    @property
    def num_documents(self) -> int:
        """Documents ended so far."""
        return self._num_documents

    @property
    def written(self) -> Written:
        """How much was written so far, which is in the files after `flush`."""
        return Written(self._num_sequences, self.num_tokens)

    @property
    def bin_sha256(self) -> str:
        """SHA-256 of the tokens added so far, but for those of `add_pair`."""
        return self._sha256.hexdigest()

    def add_sequence(self, tokens: ArrayLike) -> None:
        """Append one sequence (one document's tokens, or one sentence's)."""
        values = np.asarray(tokens)
        if values.dtype != self.dtype:
            values = self._checked(values)
        self._append(values, np.array([values.size]))

    def end_document(self) -> None:
        """The sequences added since the last call are one document."""
        if self._ends is None and self._num_sequences != self._num_documents + 1:
            self._ends = array("q", range(1, self._num_documents + 1))
        self._num_documents += 1
        if self._ends is not None:
            self._ends.append(self._num_sequences)

    def add_documents(self, tokens: NDArray[np.integer], sizes: ArrayLike) -> None:
        """Append many one-sequence documents: their tokens back to back, in the pair's dtype, and their sizes."""
        lengths = np.asarray(sizes, dtype=np.int64)
        assert tokens.dtype == self.dtype and int(lengths.sum()) == tokens.size, (tokens.dtype, tokens.size)
        first = self._num_sequences
        self._append(tokens, lengths)
        self._add_ends(np.arange(first + 1, self._num_sequences + 1))

    def add_pair(self, pair: IndexedReader) -> None:
        """Append all of another pair of the same dtype, without reading its tokens."""
        assert pair.dtype == self.dtype, (pair.dtype, self.dtype)
        first = self._num_sequences
        self._bin.flush()
        with open(pair.bin_path, "rb", buffering=0) as tokens:
            copy_bytes(tokens, self._bin, pair.num_tokens * self.dtype.itemsize)
        for start in range(0, len(pair), CHUNK):
            self._idx.write(pair.sizes[start : start + CHUNK].tobytes())
        self.num_tokens += pair.num_tokens
        self._num_sequences += len(pair)
        for start in range(1, pair.num_documents + 1, CHUNK):
            self._add_ends(first + pair.document_index[start : start + CHUNK])

    def _add_ends(self, ends: NDArray[np.int64]) -> None:
        """Documents that end behind these numbers of sequences."""
        count = len(ends)
        if self._ends is None and not np.array_equal(ends, np.arange(count) + self._num_documents + 1):
            self._ends = array("q", range(1, self._num_documents + 1))
        self._num_documents += count
        if self._ends is not None:
            self._ends.frombytes(ends.astype(np.int64).tobytes())

    def _append(self, tokens: NDArray[np.integer], sizes: NDArray[np.int64]) -> None:
        assert self._files is not None, "the writer is closed"
        longest = int(sizes.max()) if sizes.size else 0
        if longest > MAX_SEQUENCE:
            raise DataError(f"a sequence of {longest:,} tokens is too long: the format holds {MAX_SEQUENCE:,}")
        content = tokens.tobytes()
        self._bin.write(content)
        self._sha256.update(content)
        self._idx.write(sizes.astype("<i4").tobytes())
        self._num_sequences += len(sizes)
        self.num_tokens += tokens.size

    def _checked(self, values: NDArray[np.integer]) -> NDArray[np.integer]:
        if values.size == 0:
            return np.empty(0, self.dtype)
        assert np.issubdtype(values.dtype, np.integer) and values.ndim == 1, (values.dtype, values.shape)
        low, high, limits = int(values.min()), int(values.max()), np.iinfo(self.dtype)
        if low < limits.min or high > limits.max:
            raise DataError(
                f"token {low if low < limits.min else high} does not fit in {self.dtype.name} "
                f"({limits.min} … {limits.max}), the dtype of {self.bin_path}"
            )
        return values.astype(self.dtype)

    def flush(self) -> None:
        """Hand what was added to the operating system."""
        if not self._finished:
            self._bin.flush()
            self._idx.flush()

    def sync(self) -> None:
        """Have on the disk what was flushed. May be called from another thread."""
        if not self._finished:
            os.fsync(self._bin.fileno())
            os.fsync(self._idx.fileno())

    def finish(self) -> None:
        """Write the index: both files are then whole and on the disk, still under their temporary names.

        Every sequence must belong to an ended document.
        """
        last = self._num_documents if self._ends is None else (self._ends[-1] if self._ends else 0)
        assert last == self._num_sequences, "end_document was not called after the last sequence"
        assert self._files is not None, "the writer is closed"
        if not self._finished:
            self._write_index()
            self.flush()
            self.sync()
            self._files.close()
            self._finished = True

    def close(self) -> None:
        """Write the index and give both files their names."""
        if self._files is None:
            return
        self.finish()
        publish_pair(self.prefix, self.partial_bin, self.partial_idx)
        self._files = None

    def _write_index(self) -> None:
        self._idx.seek(0)
        entries = self._num_documents + 1
        self._idx.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self._num_sequences, entries))
        self._idx.flush()
        end_bytes = 0
        with open(self.partial_idx, "rb") as written:
            written.seek(HEADER.size)
            self._idx.seek(0, os.SEEK_END)
            for start in range(0, self._num_sequences, CHUNK):
                sizes = np.fromfile(written, "<i4", min(CHUNK, self._num_sequences - start))
                # 64-bit throughout: a 32-bit sum would overflow past 2 GiB.
                ends = end_bytes + np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize
                self._idx.write(np.concatenate(([end_bytes], ends[:-1])).astype("<i8").tobytes())
                end_bytes = int(ends[-1])
        if self._ends is not None:
            self._idx.write(
                np.array([0], "<i8").tobytes() + np.frombuffer(self._ends, np.int64).astype("<i8").tobytes()
            )
            return
        for start in range(0, entries, CHUNK):
            self._idx.write(np.arange(start, min(entries, start + CHUNK), dtype="<i8").tobytes())

    def leave(self) -> None:
        """Close the files as they are, to go on with later."""
        files, self._files = self._files, None
        if files is not None:
            files.close()

    def abort(self) -> None:
        """Remove what was written so far. Nothing happens after `close`."""
        if self._files is None:
            return
        try:
            self.leave()
        finally:
            for path in (self.partial_bin, self.partial_idx):
                path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def publish_pair(prefix: str | Path, partial_bin: Path, partial_idx: Path) -> None:
    """Give a pair's whole files their names; what is done already is passed over, so that it can be done again."""
    bin_path, idx_path = pair_paths(prefix)
    if partial_bin.exists():
        # The old index goes first: whenever this is interrupted, there is no index beside tokens it does not describe.
        idx_path.unlink(missing_ok=True)
        partial_bin.replace(bin_path)
    if partial_idx.exists():
        partial_idx.replace(idx_path)
    fsync_folder(idx_path.parent)


def copy_bytes(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    """Append `num_bytes` of a file, from where it stands, to another that is flushed; within the kernel if it can.

    Raises DataError if there are not so many.
    """
    left, in_kernel = num_bytes, True
    while left:
        if in_kernel:
            try:
                count = os.copy_file_range(source.fileno(), target.fileno(), left)
            except OSError as error:
                if error.errno not in _NO_COPY_IN_KERNEL:
                    raise
                in_kernel = False
                continue
        else:
            block = source.read(min(left, _COPY_BYTES))
            count = len(block)
            target.write(block)
        if not count:
            raise DataError(f"{source.name} ends {left:,} bytes early; it was changed meanwhile")
        left -= count
    target.flush()
    target.seek(0, os.SEEK_END)
