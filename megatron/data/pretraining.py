"""Pretraining samples of one `.bin/.idx` pair, in the `megatron` or in the `stable` order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron.data.dataset import ENDLESS, to_sample
from megatron.data.indexed import IndexedReader
from megatron.data.order import KeyedPermutation, megatron_order
from megatron.utils.errors import DataError


class MegatronOrderDataset:
    """The samples of Megatron's GPT dataset, in its order, for a number of requested samples and a seed.

    Sample i is a run of `sequence_length` + 1 tokens over the shuffled documents; documents are repeated as often as
    that takes. The order depends on `samples`. Raises DataError if the pair holds no tokens.
    """

    def __init__(self, prefix: str, *, sequence_length: int, samples: int, seed: int) -> None:
        self._reader = IndexedReader(prefix)
        self._sequence_length = sequence_length
        _require_tokens(self._reader, 1, sequence_length)
        self.order = megatron_order(self._reader.sizes, sequence_length=sequence_length, samples=samples, seed=seed)

    def __len__(self) -> int:
        return len(self.order)

    def sample(self, index: int) -> NDArray[np.int64]:
        """Sample `index` of the order."""
        documents, start, end = self._run(index)
        if len(documents) == 1:
            tokens = self._reader.read(documents[0], start, end + 1 - start)
        else:
            inner = [self._reader.read(document) for document in documents[1:-1]]
            head, tail = self._reader.read(documents[0], start), self._reader.read(documents[-1], 0, end + 1)
            tokens = np.concatenate([head, *inner, tail])
        return to_sample(tokens, self._sequence_length, lambda: self.source(index))

    def boundaries(self, index: int) -> NDArray[np.int64]:
        """Where in sample `index` the next entry of the order begins: what is shuffled as one is a document."""
        documents, start, _ = self._run(index)
        ends = np.cumsum(self._reader.sizes[documents[:-1]], dtype=np.int64) - start
        return np.unique(ends[ends > 0])  # an empty one ends where the one before it does

    def _run(self, index: int) -> tuple[list[int], int, int]:
        """(the documents of sample `index`, its first token in the first of them, its last token in the last)."""
        run = int(self.order.shuffle_index[index])
        (first, start), (last, end) = self.order.sample_index[run : run + 2].tolist()
        return self.order.document_index[first : last + 1].tolist(), start, end

    def source(self, index: int) -> str:
        run = int(self.order.shuffle_index[index])
        entry, offset = self.order.sample_index[run].tolist()
        return f"{self._reader.bin_path} (sequence {self.order.document_index[entry]}, token {offset} onwards)"


class StableOrderDataset:
    """Windows of the documents joined in file order, each once per epoch, in a permutation keyed by (seed, epoch).

    Window w is tokens w·S … w·S + S inclusive, so neighbours share one token; the fewer than S tokens after the last
    whole window are not used. Sample i depends on nothing but the data, S, the seed and i, so a run may be extended or
    its batch changed without changing what comes next. Endless. Raises DataError if there is less than one window.
    """

    def __init__(self, prefix: str, *, sequence_length: int, seed: int) -> None:
        self._reader = IndexedReader(prefix)
        self._sequence_length = sequence_length
        self._seed = seed
        _require_tokens(self._reader, sequence_length + 1, sequence_length)
        self.windows_per_epoch = (self._reader.num_tokens - 1) // sequence_length
        self._epoch = 0
        self._permutation = KeyedPermutation(self.windows_per_epoch, seed=seed, epoch=0)

    def __len__(self) -> int:
        return ENDLESS

    def window(self, index: int) -> int:
        """The window that sample `index` is."""
        epoch, position = divmod(index, self.windows_per_epoch)
        permutation = self._permutation
        if epoch != self._epoch:
            permutation = KeyedPermutation(self.windows_per_epoch, seed=self._seed, epoch=epoch)
            self._epoch, self._permutation = epoch, permutation
        return permutation(position)

    def sample(self, index: int) -> NDArray[np.int64]:
        """Sample `index` of the order."""
        start = self.window(index) * self._sequence_length
        tokens = self._reader.read_stream(start, start + self._sequence_length + 1)
        return to_sample(tokens, self._sequence_length, lambda: self.source(index))

    def boundaries(self, index: int) -> NDArray[np.int64]:
        """Where in sample `index` documents of the file begin."""
        start = self.window(index) * self._sequence_length
        return self._reader.document_starts(start, start + self._sequence_length + 1) - start

    def source(self, index: int) -> str:
        return f"{self._reader.bin_path} (token {self.window(index) * self._sequence_length:,} onwards)"


def _require_tokens(reader: IndexedReader, needed: int, sequence_length: int) -> None:
    tokens = reader.num_tokens
    if tokens < needed:
        smaller = f" or a data.sequence_length of at most {tokens - 1:,}" if tokens >= 2 else ""
        raise DataError(
            f"{reader.prefix} holds {tokens:,} tokens, fewer than the {needed:,} that data.sequence_length="
            f"{sequence_length} needs; use more text{smaller}"
        )
