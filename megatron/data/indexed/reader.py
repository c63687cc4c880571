"""Reading a pair: every check on the two files, and views of their content."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed.format import (
    CHUNK,
    DTYPES,
    FLOAT_CODES,
    HEADER,
    LEGACY_MAGIC,
    MAGIC,
    VERSION,
    clean_prefix,
    pair_paths,
)
from megatron.utils.errors import DataError

_REMEDY = "copy the pair again, or write it again with `megatron preprocess`"


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
            self.dtype, sequences, entries = _parse_header(self.idx_path, file.read(HEADER.size))
        expected = HEADER.size + 12 * sequences + 8 * entries
        if length not in (expected, expected + sequences):  # one more byte per sequence: Megatron Core's modes
            raise DataError(
                f"{self.idx_path} is {length:,} bytes, but its header ({sequences:,} sequences, {entries:,} document "
                f"entries) asks for {expected:,}: {_damage(length, expected)}; {_REMEDY}"
            )
        content = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        pointers_start = HEADER.size + 4 * sequences
        documents_start = pointers_start + 8 * sequences
        self.sizes: NDArray[np.int32] = content[HEADER.size : pointers_start].view("<i4")
        self.pointers: NDArray[np.int64] = content[pointers_start:documents_start].view("<i8")
        documents: NDArray[np.int64] = content[documents_start:expected].view("<i8")
        self.num_tokens = self._check_pointers()
        _check_documents(self.idx_path, documents, sequences)
        # A lone 0 comes from writers that never closed a document; each sequence is then one.
        self.document_index = np.arange(sequences + 1) if len(documents) == 1 and sequences else documents

    def _check_pointers(self) -> int:
        """Check that sequences lie back to back and fill the `.bin` exactly; the number of tokens."""
        end_bytes = 0
        for start in range(0, len(self.sizes), CHUNK):
            sizes = self.sizes[start : start + CHUNK].astype(np.int64)
            if sizes.min() < 0:
                bad = start + int(np.argmax(sizes < 0))
                raise DataError(f"{self.idx_path}: sequence {bad} has the negative length {self.sizes[bad]}; {_REMEDY}")
            ends = end_bytes + np.cumsum(sizes) * self.dtype.itemsize
            starts = np.concatenate(([end_bytes], ends[:-1]))
            wrong = self.pointers[start : start + CHUNK] != starts
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
        # Not numpy's search, which copies all of an array that is not aligned, as these are not in their file.
        pointers, documents = self.pointers.view(np.ndarray), self.document_index.view(np.ndarray)
        low = bisect_right(pointers, start * self.dtype.itemsize)
        high = bisect_left(pointers, stop * self.dtype.itemsize, lo=low)
        first = bisect_left(documents, low)
        last = bisect_left(documents, high, lo=first)
        begins = pointers[documents[first:last]] // self.dtype.itemsize
        later = np.ones(len(begins), dtype=np.bool_)
        np.not_equal(begins[1:], begins[:-1], out=later[1:])  # an empty one begins where the next one does
        return begins[later]

    def _map_tokens(self) -> NDArray[np.integer]:
        if self.num_tokens == 0:  # an empty file cannot be mapped
            return np.empty(0, self.dtype)
        try:
            return np.memmap(self.bin_path, dtype=self.dtype, mode="r", shape=(self.num_tokens,))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.bin_path} cannot be read: {error}") from error


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
    if header.startswith(LEGACY_MAGIC):
        raise DataError(
            f"{path} is in the old TNTIDX dialect (`lazy` or `cached`), which is not read; "
            "tokenize the text again with `megatron preprocess`"
        )
    if header[: len(MAGIC)] != MAGIC[: len(header)] or not header:
        raise DataError(f"{path} is not a token index: it begins with {header[:9]!r}, not with {MAGIC!r}; {_REMEDY}")
    if len(header) < HEADER.size:
        raise DataError(f"{path} is truncated within its header ({len(header)} of {HEADER.size} bytes); {_REMEDY}")
    _, version, code, sequences, entries = HEADER.unpack(header)
    if version != VERSION:
        raise DataError(f"{path} has version {version}; only version {VERSION} is known")
    if code in FLOAT_CODES:
        raise DataError(f"{path} has dtype code {code}, a floating-point type: tokens are integers; {_REMEDY}")
    if code not in DTYPES:
        raise DataError(f"{path} has the unknown dtype code {code}; known are {sorted(DTYPES)}; {_REMEDY}")
    return np.dtype(DTYPES[code]), sequences, entries


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
    for start in range(0, len(documents) - 1, CHUNK):
        chunk = documents[start : start + CHUNK + 1]
        falls = chunk[1:] < chunk[:-1]
        if falls.any():
            at = start + int(np.argmax(falls))
            raise DataError(
                f"{path}: the document index falls from {documents[at]} to {documents[at + 1]} at entry {at + 1}; "
                f"{_REMEDY}"
            )
