"""Pretraining samples of one `.bin/.idx` pair, in the `megatron` or in the `stable` order."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from megatron.data.dataset import ENDLESS, PADDING, sample_of
from megatron.data.order import KeyedPermutation, megatron_order
from megatron.data.stream import Excerpt, Pieces, Stream, runs
from megatron.utils.errors import DataError


class StoredDataset(ABC):
    """What both orders, and windows in file order, have in common: samples are pieces of a stream.

    `samples_per_epoch` is how many samples it takes until every token was predicted once.
    """

    samples_per_epoch: float

    def __init__(self, stream: Stream, sequence_length: int) -> None:
        self.stream = stream
        self.sequence_length = sequence_length

    @abstractmethod
    def pieces(self, indices: NDArray[np.int64]) -> Pieces:
        """What these samples are made of."""

    @abstractmethod
    def __len__(self) -> int:
        """Samples that can be addressed."""

    @abstractmethod
    def boundaries_of(self, indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Where in each of these samples documents begin behind its first token."""

    def boundaries(self, index: int) -> NDArray[np.int64]:
        """Where in sample `index` documents begin behind its first token."""
        return self.boundaries_of(np.array([index]))[0]

    @abstractmethod
    def source(self, index: int) -> str:
        """Where a sample comes from, in words for an error message."""

    def sample(self, index: int) -> NDArray[np.int64]:
        """Sample `index`."""
        return sample_of(self, index)

    def fill(
        self,
        indices: NDArray[np.int64],
        tokens: NDArray[np.int64],
        labels: NDArray[np.int64],
        at: NDArray[np.int64],
    ) -> tuple[int, int]:
        """Sample `indices[k]` into the rows `at[k]`. Raises DataError for a negative stored token, which could
        otherwise pass for padding."""
        pieces = self.pieces(indices)
        low, high = self.stream.read(pieces, tokens, labels, at)
        if low < 0:
            starts, lengths = pieces.starts.tolist(), pieces.lengths.tolist()
            for sample, start, length in zip(pieces.samples.tolist(), starts, lengths, strict=True):
                lowest = self.stream.lowest(start, length)
                if lowest < 0:
                    raise DataError(
                        f"{self.source(int(indices[sample]))} holds the token {lowest}; tokens are not negative, so "
                        "the data are damaged"
                    )
        return (low if pieces.whole(self.sequence_length, len(indices)) else PADDING), high

    def announce(self, indices: NDArray[np.int64]) -> None:
        """These samples will be read soon."""
        self.stream.announce(self.pieces(indices))

    def excerpts(self, index: int) -> list[Excerpt]:
        """Which tokens of which documents sample `index` is made of."""
        return self.stream.excerpts(self.pieces(np.array([index])))[0]


class MegatronOrderDataset(StoredDataset):
    """The samples of Megatron's GPT dataset, in its order, for a number of requested samples and a seed.

    Sample i is a run of `sequence_length` + 1 tokens over the shuffled sequences of the stream; they are repeated as
    often as that takes. The order depends on `samples`. Raises DataError if the stream holds no tokens.
    """

    def __init__(self, stream: Stream, *, sequence_length: int, samples: int, seed: int) -> None:
        super().__init__(stream, sequence_length)
        _require_tokens(stream, 1, sequence_length)
        self.order = megatron_order(stream.sizes, sequence_length=sequence_length, samples=samples, seed=seed)
        self.samples_per_epoch = stream.num_tokens / sequence_length

    def __len__(self) -> int:
        return len(self.order)

    def pieces(self, indices: NDArray[np.int64]) -> Pieces:
        """What these samples are made of: of each sequence they touch, one piece."""
        shuffled = self.order.shuffle_index[indices].astype(np.int64)
        first, begin = self.order.sample_index[shuffled].T.astype(np.int64)
        last, end = self.order.sample_index[shuffled + 1].T.astype(np.int64)
        counts = last - first + 1
        ends = np.cumsum(counts)
        samples = np.repeat(np.arange(len(indices)), counts)
        entries = np.arange(ends[-1]) - (ends - counts - first)[samples]
        sequences = self.order.document_index[entries] + np.int64(self.stream.first)
        starts = np.zeros(len(entries), dtype=np.int64)
        stops = self.stream.reader.sizes[sequences].astype(np.int64)
        starts[ends - counts] = begin
        stops[ends - 1] = end + 1
        lengths = stops - starts
        before = np.cumsum(lengths) - lengths
        return Pieces(
            samples, before - before[ends - counts][samples], self.stream.starts_of(sequences) + starts, lengths
        )

    def boundaries_of(self, indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Where in each sample the next entry of the order begins: what is shuffled as one is a document."""
        pieces = self.pieces(indices)
        # Of entries that begin at one place all but the last are empty; what begins a sample is no boundary.
        some = (pieces.columns > 0) & (pieces.lengths > 0)
        counts = np.bincount(pieces.samples[some], minlength=len(indices))
        return np.split(pieces.columns[some], np.cumsum(counts)[:-1])

    def source(self, index: int) -> str:
        entry, offset = self.order.sample_index[self.order.shuffle_index[index]].tolist()
        sequence = int(self.order.document_index[entry]) + self.stream.first
        return self.stream.source(f"sequence {sequence}, token {offset} onwards")


class StableOrderDataset(StoredDataset):
    """Windows of the stream in file order, each once per epoch, in a permutation keyed by (seed, epoch).

    Window w is tokens w·S … w·S + S inclusive, so neighbours share one token; the fewer than S tokens after the last
    whole window are not used. Sample i depends on nothing but the data, S, the seed and i, so a run may be extended or
    its batch changed without changing what comes next. Endless. Raises DataError if there is less than one window.
    """

    def __init__(self, stream: Stream, *, sequence_length: int, seed: int) -> None:
        super().__init__(stream, sequence_length)
        self._seed = seed
        _require_tokens(stream, sequence_length + 1, sequence_length)
        self.windows_per_epoch = (stream.num_tokens - 1) // sequence_length
        self.samples_per_epoch = float(self.windows_per_epoch)
        self._permutations: dict[int, KeyedPermutation] = {}

    def __len__(self) -> int:
        return ENDLESS

    def window(self, index: int) -> int:
        """The window that sample `index` is."""
        epoch, position = divmod(index, self.windows_per_epoch)
        return self._permutation(epoch)(position)

    def windows(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows that these samples are."""
        epochs, positions = np.divmod(indices, self.windows_per_epoch)
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            of_epoch = epochs == epoch
            windows[of_epoch] = self._permutation(epoch).of(positions[of_epoch])
        return windows

    def _permutation(self, epoch: int) -> KeyedPermutation:
        if epoch not in self._permutations:
            if len(self._permutations) > 8:  # enough for every epoch that a step and those read ahead may touch
                self._permutations.clear()
            self._permutations[epoch] = KeyedPermutation(self.windows_per_epoch, seed=self._seed, epoch=epoch)
        return self._permutations[epoch]

    def pieces(self, indices: NDArray[np.int64]) -> Pieces:
        """What these samples are made of: one run each."""
        starts = self.stream.start + self.windows(indices) * self.sequence_length
        return runs(starts, np.full(len(starts), self.sequence_length + 1))

    def boundaries_of(self, indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Where in each sample documents of the file begin."""
        starts = (self.windows(indices) * self.sequence_length).tolist()
        return [self.stream.document_starts(start, start + self.sequence_length + 1) - start for start in starts]

    def source(self, index: int) -> str:
        start = self.stream.start + self.window(index) * self.sequence_length
        return self.stream.source(f"token {start:,} onwards")


def _require_tokens(stream: Stream, needed: int, sequence_length: int) -> None:
    tokens = stream.num_tokens
    if tokens < needed:
        smaller = f" or a data.sequence_length of at most {tokens - 1:,}" if tokens >= 2 else ""
        part = "" if len(stream.sizes) == len(stream.reader) else " in the part of data.split"
        raise DataError(
            f"{stream.prefix} holds {tokens:,} tokens{part}, fewer than the {needed:,} that data.sequence_length="
            f"{sequence_length} needs; use more text{smaller}"
        )
