"""Megatron's `MMIDIDX` pairs: `PREFIX.bin` (the tokens, back to back) and `PREFIX.idx` (where each sequence is).

This module owns the bytes of the two files and every check on them. It must not know what tokens mean, in which order
they are read, nor torch. Format: a 34-byte header (magic, version, dtype code, number of sequences `n`, length of the
document index `d`), then i32[n] sizes, i64[n] byte offsets, i64[d] the sequence at which each document starts and a
closing `n`; everything little-endian.
"""

from __future__ import annotations

import secrets
import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron.utils.errors import DataError
from megatron.utils.files import fsync_file, fsync_folder

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_LEGACY_MAGIC = b"TNTIDX\x00\x00"
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_FLOAT_CODES = (6, 7)
_UINT16_VOCABULARY = 65_500  # Megatron's own limit, a little under what u16 could hold
_MAX_SEQUENCE = 2**31 - 1
_CHUNK = 1 << 20  # entries of the index that are checked at a time: memory stays small whatever the corpus


def dtype_for_vocabulary(size: int) -> np.dtype:
    """The dtype that Megatron chooses: u16 for a vocabulary (added tokens included) below 65,500, else i32."""
    return np.dtype("<u2") if size < _UINT16_VOCABULARY else np.dtype("<i4")


def clean_prefix(prefix: str | Path) -> str:
    """A prefix as users give it, without the `.bin` or `.idx` that they may have left on it."""
    return str(prefix).removesuffix(".bin").removesuffix(".idx")


def pair_paths(prefix: str | Path) -> tuple[Path, Path]:
    """The paths of a prefix's `.bin` and `.idx`. (A prefix may hold dots, so `Path.with_suffix` would not do.)"""
    clean = clean_prefix(prefix)
    return Path(f"{clean}.bin"), Path(f"{clean}.idx")


class IndexedReader:
    """A `.bin/.idx` pair, checked when opened and mapped, not read.

    `sizes` i32[n] (tokens of each sequence), `pointers` i64[n] (byte offsets), `document_index` i64[documents + 1],
    `dtype` of the tokens, `num_tokens`. The `.bin` is mapped at the first read. Raises DataError for a pair that is
    missing, damaged, of another dialect, or whose two files do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = clean_prefix(prefix)
        self.bin_path, self.idx_path = pair_paths(self.prefix)
        require_pair(self.prefix)
        try:
            self._open_index()
        except OSError as error:
            raise DataError(f"{self.idx_path} cannot be read: {error.strerror or error}") from error
        self._tokens: NDArray[np.integer] | None = None

    def _open_index(self) -> None:
        length = self.idx_path.stat().st_size
        with open(self.idx_path, "rb") as file:
            self.dtype, sequences, entries = _parse_header(self.idx_path, file.read(_HEADER.size))
        expected = _HEADER.size + 12 * sequences + 8 * entries
        if length not in (expected, expected + sequences):  # one more byte per sequence: Megatron Core's modes
            raise DataError(
                f"{self.idx_path} is {length:,} bytes, but its header ({sequences:,} sequences, {entries:,} document "
                f"entries) asks for {expected:,}: {_damage(length, expected)}; {_REMEDY}"
            )
        content = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        pointers_start = _HEADER.size + 4 * sequences
        documents_start = pointers_start + 8 * sequences
        self.sizes: NDArray[np.int32] = content[_HEADER.size : pointers_start].view("<i4")
        self.pointers: NDArray[np.int64] = content[pointers_start:documents_start].view("<i8")
        documents: NDArray[np.int64] = content[documents_start:expected].view("<i8")
        self.num_tokens = self._check_pointers()
        _check_documents(self.idx_path, documents, sequences)
        # A lone 0 comes from writers that never closed a document; each sequence is then one.
        self.document_index = np.arange(sequences + 1) if len(documents) == 1 and sequences else documents

    def _check_pointers(self) -> int:
        """Check that sequences lie back to back and fill the `.bin` exactly; the number of tokens."""
        end_bytes = 0
        for start in range(0, len(self.sizes), _CHUNK):
            sizes = self.sizes[start : start + _CHUNK].astype(np.int64)
            if sizes.min() < 0:
                bad = start + int(np.argmax(sizes < 0))
                raise DataError(f"{self.idx_path}: sequence {bad} has the negative length {self.sizes[bad]}; {_REMEDY}")
            ends = end_bytes + np.cumsum(sizes) * self.dtype.itemsize
            starts = np.concatenate(([end_bytes], ends[:-1]))
            wrong = self.pointers[start : start + _CHUNK] != starts
            if wrong.any():
                at = int(np.argmax(wrong))
                raise DataError(
                    f"{self.idx_path}: sequence {start + at} is said to start at byte {self.pointers[start + at]:,}, "
                    f"but those before it end at byte {starts[at]:,}; sequences lie back to back, so {_REMEDY}"
                )
            end_bytes = int(ends[-1])
        actual = self.bin_path.stat().st_size
        if actual != end_bytes:
            raise DataError(
                f"{self.bin_path} is {actual:,} bytes, but {self.idx_path.name} describes {end_bytes:,}: "
                f"{_damage(actual, end_bytes)}; {_REMEDY}"
            )
        return end_bytes // self.dtype.itemsize

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sizes)

    @property
    def num_documents(self) -> int:
        return len(self.document_index) - 1

    def read(self, sequence: int, offset: int = 0, length: int | None = None) -> NDArray[np.integer]:
        """Tokens `offset … offset + length` (to the end if None) of a sequence, as a read-only view of the file."""
        size = int(self.sizes[sequence])
        stop = size if length is None else offset + length
        assert 0 <= offset <= stop <= size, (sequence, offset, length, size)
        first = int(self.pointers[sequence]) // self.dtype.itemsize
        return self.read_stream(first + offset, first + stop)

    def read_stream(self, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens `start … stop` of all sequences joined in file order, as a read-only view of the file."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        if self._tokens is None:
            self._tokens = self._map_tokens()
        return self._tokens[start:stop]

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where, strictly between `start` and `stop`, documents begin among the tokens of `read_stream`; each once."""
        low = np.searchsorted(self.pointers, start * self.dtype.itemsize, side="right")
        high = np.searchsorted(self.pointers, stop * self.dtype.itemsize, side="left")
        first, last = np.searchsorted(self.document_index, [low, high])
        begins = self.pointers[self.document_index[first:last]] // self.dtype.itemsize
        return np.unique(begins)  # an empty document begins where the next one does

    def _map_tokens(self) -> NDArray[np.integer]:
        if self.num_tokens == 0:  # an empty file cannot be mapped
            return np.empty(0, self.dtype)
        try:
            return np.memmap(self.bin_path, dtype=self.dtype, mode="r", shape=(self.num_tokens,))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.bin_path} cannot be read: {error}") from error


class IndexedWriter:
    """Writes a `.bin/.idx` pair, streaming: 12 bytes of memory per sequence, however long the sequences.

    The files carry temporary names until `close` renames them, so no reader ever sees half a pair. Used as a context
    manager, an exception leaves nothing behind. Raises DataError for tokens that the dtype cannot hold.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | str) -> None:
        self.prefix = clean_prefix(prefix)
        self.dtype = np.dtype(dtype)
        assert self.dtype in _CODES, f"{self.dtype} cannot hold tokens"
        self.num_tokens = 0
        self.bin_path, self.idx_path = pair_paths(self.prefix)
        # Of this writer alone: two runs that were given the same prefix by mistake must not mix their tokens.
        ending = f".{secrets.token_hex(4)}.partial"
        self._partial_bin = self.bin_path.with_name(self.bin_path.name + ending)
        self._partial_idx = self.idx_path.with_name(self.idx_path.name + ending)
        self._sizes = array("i")
        self._documents = array("q", [0])
        self._file: BinaryIO | None = open(self._partial_bin, "wb", buffering=1 << 20)  # noqa: SIM115 - closed by close

    @property
    def num_documents(self) -> int:
        """Documents ended so far."""
        return len(self._documents) - 1

    def add_sequence(self, tokens: ArrayLike) -> None:
        """Append one sequence (one document's tokens, or one sentence's)."""
        values = np.asarray(tokens)
        if values.dtype != self.dtype:
            values = self._checked(values)
        self._append(values, [values.size])

    def end_document(self) -> None:
        """The sequences added since the last call are one document."""
        self._documents.append(len(self._sizes))

    def add_documents(self, tokens: NDArray[np.integer], sizes: ArrayLike) -> None:
        """Append many one-sequence documents: their tokens back to back, in the pair's dtype, and their sizes."""
        lengths = np.asarray(sizes, dtype=np.int64)
        assert tokens.dtype == self.dtype and int(lengths.sum()) == tokens.size, (tokens.dtype, tokens.size)
        first = len(self._sizes)
        self._append(tokens, lengths.tolist())
        self._documents.extend(range(first + 1, len(self._sizes) + 1))

    def _append(self, tokens: NDArray[np.integer], sizes: list[int]) -> None:
        assert self._file is not None, "the writer is closed"
        if sizes and max(sizes) > _MAX_SEQUENCE:
            raise DataError(f"a sequence of {max(sizes):,} tokens is too long: the format holds {_MAX_SEQUENCE:,}")
        self._file.write(tokens.tobytes())
        self._sizes.extend(sizes)
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

    def close(self) -> None:
        """Write the index and give both files their names. Every sequence must belong to an ended document."""
        if self._file is None:
            return
        assert self._documents[-1] == len(self._sizes), "end_document was not called after the last sequence"
        self._file.close()
        self._write_index()
        for path in (self._partial_bin, self._partial_idx):
            fsync_file(path)
        # The old index goes first: whenever this is interrupted, there is no index beside tokens it does not describe.
        self.idx_path.unlink(missing_ok=True)
        self._partial_bin.replace(self.bin_path)
        self._partial_idx.replace(self.idx_path)
        fsync_folder(self.idx_path.parent)
        self._file = None

    def _write_index(self) -> None:
        sizes = np.frombuffer(self._sizes, dtype=np.int32)
        documents = np.frombuffer(self._documents, dtype=np.int64)
        end_bytes = 0
        with open(self._partial_idx, "wb") as file:
            file.write(_HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], len(sizes), len(documents)))
            file.write(sizes.astype("<i4").tobytes())
            for start in range(0, len(sizes), _CHUNK):
                # 64-bit throughout: a 32-bit sum would overflow past 2 GiB.
                ends = end_bytes + np.cumsum(sizes[start : start + _CHUNK], dtype=np.int64) * self.dtype.itemsize
                file.write(np.concatenate(([end_bytes], ends[:-1])).astype("<i8").tobytes())
                end_bytes = int(ends[-1])
            file.write(documents.astype("<i8").tobytes())

    def abort(self) -> None:
        """Remove what was written so far. Nothing happens after `close`."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            file.close()
        finally:
            for path in (self._partial_bin, self._partial_idx):
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


_REMEDY = "copy the pair again, or write it again with `megatron preprocess`"


def _damage(actual: int, expected: int) -> str:
    if actual < expected:
        return "the file is truncated"
    return "the file is too long, or the two files do not belong together"


def require_pair(prefix: str | Path) -> None:
    """Raise DataError, saying what is there instead, unless both files of a pair exist."""
    bin_path, idx_path = pair_paths(prefix)
    missing = [path for path in (bin_path, idx_path) if not path.is_file()]
    if len(missing) == 1:
        other = idx_path if missing[0] == bin_path else bin_path
        raise DataError(f"{missing[0]} is missing, though {other.name} is there; a pair needs both")
    if missing:
        similar = sorted(path.stem for path in bin_path.parent.glob("*.idx")) if bin_path.parent.is_dir() else []
        close = [stem for stem in similar if stem.startswith(bin_path.stem)] or similar
        found = f" (there are: {', '.join(close[:5])})" if close else ""
        raise DataError(
            f"no token data at {str(prefix)!r}: neither {bin_path.name} nor {idx_path.name} is in {bin_path.parent}"
            f"{found}; give the path of a pair without its extension"
        )


def _parse_header(path: Path, header: bytes) -> tuple[np.dtype, int, int]:
    """(dtype, sequences, document entries) of an index, or DataError."""
    if header.startswith(_LEGACY_MAGIC):
        raise DataError(
            f"{path} is in the old TNTIDX dialect (`lazy` or `cached`), which is not read; "
            "tokenize the text again with `megatron preprocess`"
        )
    if header[: len(MAGIC)] != MAGIC[: len(header)] or not header:
        raise DataError(f"{path} is not a token index: it begins with {header[:9]!r}, not with {MAGIC!r}; {_REMEDY}")
    if len(header) < _HEADER.size:
        raise DataError(f"{path} is truncated within its header ({len(header)} of {_HEADER.size} bytes); {_REMEDY}")
    _, version, code, sequences, entries = _HEADER.unpack(header)
    if version != VERSION:
        raise DataError(f"{path} has version {version}; only version {VERSION} is known")
    if code in _FLOAT_CODES:
        raise DataError(f"{path} has dtype code {code}, a floating-point type: tokens are integers; {_REMEDY}")
    if code not in _DTYPES:
        raise DataError(f"{path} has the unknown dtype code {code}; known are {sorted(_DTYPES)}; {_REMEDY}")
    return np.dtype(_DTYPES[code]), sequences, entries


def _check_documents(path: Path, documents: NDArray[np.int64], sequences: int) -> None:
    if len(documents) == 0 or documents[0] != 0:
        first = documents[0] if len(documents) else "nothing"
        raise DataError(f"{path}: the document index begins with {first}, not with 0; {_REMEDY}")
    if len(documents) == 1:
        return
    if documents[-1] != sequences:
        raise DataError(
            f"{path}: the document index ends with {documents[-1]}, not with the number of sequences, {sequences}; "
            f"{_REMEDY}"
        )
    for start in range(0, len(documents) - 1, _CHUNK):
        chunk = documents[start : start + _CHUNK + 1]
        falls = chunk[1:] < chunk[:-1]
        if falls.any():
            at = start + int(np.argmax(falls))
            raise DataError(
                f"{path}: the document index falls from {documents[at]} to {documents[at + 1]} at entry {at + 1}; "
                f"{_REMEDY}"
            )
