"""The windows of a token stream in file order: what is evaluated."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import IndexedReader
from megatron.data.pretraining import StoredDataset
from megatron.data.stream import Pieces, Stream, runs
from megatron.utils.errors import DataError


class StreamWindows(StoredDataset):
    """A stream (all of a pair, or some of its sequences) cut into windows that share one token, in file order.

    Window i is tokens i·S … i·S + S; the last one may be short and is then padded. T tokens give T − 1 predictions,
    each in exactly one window; `most` keeps the first so many windows. Raises DataError if there is nothing to predict
    (fewer than two tokens).
    """

    def __init__(self, source: str | Stream, sequence_length: int, most: int | None = None) -> None:
        super().__init__(source if isinstance(source, Stream) else Stream(IndexedReader(source)), sequence_length)
        self.num_tokens = self.stream.num_tokens
        if self.num_tokens < 2:
            raise DataError(
                f"{self.stream.prefix} holds {self.num_tokens} tokens; at least 2 are needed to predict one"
            )
        self.samples_per_epoch = (self.num_tokens - 1) / sequence_length
        windows = (self.num_tokens - 2) // sequence_length + 1  # T - 1 predictions, S to a window, rounded up
        self._windows = windows if most is None else min(windows, most)

    def __len__(self) -> int:
        return self._windows

    def pieces(self, indices: NDArray[np.int64]) -> Pieces:
        """What these windows are made of: one run each, the last one of them perhaps short."""
        assert len(indices) == 0 or (indices.min() >= 0 and indices.max() < len(self)), (indices, len(self))
        starts = indices * self.sequence_length
        lengths = np.minimum(self.sequence_length + 1, self.num_tokens - starts)
        return runs(self.stream.start + starts, lengths)

    def boundaries_of(self, indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Where in each window documents begin."""
        starts = (indices * self.sequence_length).tolist()
        stops = [min(start + self.sequence_length + 1, self.num_tokens) for start in starts]
        return [self.stream.document_starts(start, stop) - start for start, stop in zip(starts, stops, strict=True)]

    def source(self, index: int) -> str:
        return self.stream.source(f"token {self.stream.start + index * self.sequence_length:,} onwards")
