"""The windows of a token stream in file order: what is evaluated."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron.data.dataset import PADDING, Dataset, to_sample
from megatron.data.indexed import IndexedReader
from megatron.utils.errors import DataError


class StreamWindows:
    """All documents of a pair joined in file order and cut into windows that share one token.

    Window i is tokens i·S … i·S + S; the last one may be short and is then padded. T tokens give T − 1 predictions,
    each in exactly one window. Raises DataError if there is nothing to predict (fewer than two tokens).
    """

    def __init__(self, prefix: str, sequence_length: int) -> None:
        self._reader = IndexedReader(prefix)
        self._sequence_length = sequence_length
        self.num_tokens = self._reader.num_tokens
        if self.num_tokens < 2:
            raise DataError(
                f"{self._reader.prefix} holds {self.num_tokens} tokens; at least 2 are needed to predict one"
            )

    def __len__(self) -> int:
        return (self.num_tokens - 2) // self._sequence_length + 1  # T - 1 predictions, S to a window, rounded up

    def sample(self, index: int) -> NDArray[np.int64]:
        """Window `index`."""
        assert 0 <= index < len(self), (index, len(self))
        start = index * self._sequence_length
        tokens = self._reader.read_stream(start, min(start + self._sequence_length + 1, self.num_tokens))
        return to_sample(tokens, self._sequence_length, lambda: self.source(index))

    def boundaries(self, index: int) -> NDArray[np.int64]:
        """Where in window `index` documents begin."""
        start = index * self._sequence_length
        return self._reader.document_starts(start, start + self._sequence_length + 1) - start

    def source(self, index: int) -> str:
        return f"{self._reader.bin_path} (token {index * self._sequence_length:,} onwards)"


class FixedSet:
    """The first so many samples of each of several datasets, one after the other: a fixed set for validation."""

    def __init__(self, parts: list[tuple[Dataset, int]]) -> None:
        self._parts = [(dataset, min(count, len(dataset))) for dataset, count in parts]

    def __len__(self) -> int:
        return sum(count for _, count in self._parts)

    def sample(self, index: int) -> NDArray[np.int64]:
        """Sample `index` of the set."""
        dataset, within = self._find(index)
        return dataset.sample(within)

    def boundaries(self, index: int) -> NDArray[np.int64]:
        """Where in sample `index` documents begin."""
        dataset, within = self._find(index)
        return dataset.boundaries(within)

    def source(self, index: int) -> str:
        dataset, within = self._find(index)
        return dataset.source(within)

    def _find(self, index: int) -> tuple[Dataset, int]:
        assert 0 <= index < len(self), (index, len(self))
        for dataset, count in self._parts:
            if index < count:
                return dataset, index
            index -= count
        raise AssertionError("unreachable: the index is below the sum of the counts")


def empty_sample(sequence_length: int) -> NDArray[np.int64]:
    """A sample without tokens and so without predictions."""
    return np.full(sequence_length + 1, PADDING, dtype=np.int64)
