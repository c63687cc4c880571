"""Some sequences of a `.bin/.idx` pair as one stream of tokens, and samples as pieces of it.

What every dataset of stored tokens does with its file is here: reading samples straight into rows, telling the system
what comes, finding out which documents a sample is of. Which samples there are, and in which order, it does not know.
"""

from __future__ import annotations

import os
import weakref
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron.data import native
from megatron.data.dataset import PADDING
from megatron.data.indexed import IndexedReader
from megatron.utils.errors import DataError


@dataclass(frozen=True)
class Pieces:
    """Runs of stored tokens that make up samples, in their order: i64 of one length each.

    `samples` is which of the samples asked for (ascending), `columns` where in it the piece begins, `starts` where in
    the tokens of the file, `lengths` how many tokens. A piece may be empty.
    """

    samples: NDArray[np.int64]
    columns: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def whole(self, sequence_length: int, samples: int) -> bool:
        """Whether so many samples all have `sequence_length` + 1 tokens: none can have more."""
        return int(self.lengths.sum()) == samples * (sequence_length + 1)


@dataclass(frozen=True)
class Excerpt:
    """Tokens `start` … `stop` − 1 of a stored sequence, which belongs to a document; both numbered within the pair."""

    document: int
    sequence: int
    start: int
    stop: int


class Stream:
    """The sequences `first` … `stop` − 1 of a pair (to its end: None) joined in file order.

    `sizes` are their lengths; `start` is the first token's place among all tokens of the file, and `num_tokens` how
    many there are. The tokens are mapped when they are first read.
    """

    def __init__(self, reader: IndexedReader, first: int = 0, stop: int | None = None) -> None:
        self.reader = reader
        self.first, self.stop = first, len(reader) if stop is None else stop
        assert 0 <= self.first <= self.stop <= len(reader), (first, stop, len(reader))
        self.sizes = reader.sizes[self.first : self.stop]
        self.start = self._token_of(self.first)
        self.num_tokens = self._token_of(self.stop) - self.start
        self._tokens: NDArray[np.integer] | None = None
        self._file: int | None = None

    @property
    def prefix(self) -> str:
        return str(self.reader.prefix)

    def starts_of(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where sequences of the pair begin among the tokens of its file."""
        return self.reader.pointers[sequences] // self.reader.dtype.itemsize

    def read(
        self, pieces: Pieces, tokens: NDArray[np.int64], labels: NDArray[np.int64], at: NDArray[np.int64]
    ) -> tuple[int, int]:
        """Copy samples into rows of `tokens` and `labels` i64[n, s], sample k into row `at[k]`; `PADDING` behind a
        short one. The lowest and the highest stored token."""
        if not pieces.whole(tokens.shape[1], len(at)):
            tokens[at] = labels[at] = PADDING
        rows = at[pieces.samples]
        return native.split(self._mapped(), pieces.starts, rows, pieces.columns, pieces.lengths, tokens, labels)

    def lowest(self, start: int, length: int) -> int:
        """The lowest of `length` tokens from `start` on; 0 where there are none."""
        return int(self._mapped()[start : start + length].min(initial=0))

    def _mapped(self) -> NDArray[np.integer]:
        """All tokens of the file. Not as a memory map of numpy's, whose every slice would take a microsecond."""
        if self._tokens is None:
            self._tokens = self.reader.read_stream(0, self.reader.num_tokens).view(np.ndarray)
        return self._tokens

    def announce(self, pieces: Pieces) -> None:
        """Tell the system that these pieces will be read soon, so that it fetches them meanwhile."""
        if self._file is None:
            try:
                self._file = os.open(self.reader.bin_path, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{self.reader.bin_path} cannot be read: {error.strerror}") from error
            weakref.finalize(self, os.close, self._file)
        itemsize = self.reader.dtype.itemsize
        for start, length in zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True):
            os.posix_fadvise(self._file, start * itemsize, length * itemsize, os.POSIX_FADV_WILLNEED)

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where, strictly between two tokens of the stream, documents begin; counted in the stream."""
        return self.reader.document_starts(self.start + start, self.start + stop) - self.start

    def excerpts(self, pieces: Pieces) -> list[list[Excerpt]]:
        """Of each sample, the excerpts of stored sequences it is made of, in its order."""
        samples = int(pieces.samples.max()) + 1 if len(pieces.samples) else 0
        found: list[list[Excerpt]] = [[] for _ in range(samples)]
        bounds, itemsize = self.reader.pointers.view(np.ndarray), self.reader.dtype.itemsize
        documents = self.reader.document_index.view(np.ndarray)
        for sample, start, length in zip(
            pieces.samples.tolist(), pieces.starts.tolist(), pieces.lengths.tolist(), strict=True
        ):
            stop = start + length
            sequence = bisect_right(bounds, start * itemsize) - 1
            while start < stop:
                begin = self._token_of(sequence)
                end = min(stop, begin + int(self.reader.sizes[sequence]))
                if end > start:
                    document = bisect_right(documents, sequence) - 1
                    found[sample].append(Excerpt(document, sequence, start - begin, end - begin))
                start, sequence = max(start, end), sequence + 1
        return found

    def source(self, place: str) -> str:
        """Where in the file, in words for an error message."""
        return f"{self.reader.bin_path} ({place})"

    def _token_of(self, sequence: int) -> int:
        """Where a sequence begins among the tokens of the file; behind the last one, where the file ends."""
        if sequence == len(self.reader):
            return int(self.reader.num_tokens)
        return int(self.reader.pointers[sequence]) // self.reader.dtype.itemsize


def runs(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Pieces:
    """The pieces of samples that are one run of tokens each."""
    return Pieces(np.arange(len(starts)), np.zeros(len(starts), dtype=np.int64), starts, lengths)
