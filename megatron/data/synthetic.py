"""Seeded random tokens: data for speed tests, where reading a corpus would be in the way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron.data.dataset import ENDLESS


class SyntheticDataset:
    """Uniformly random tokens; sample i is a pure function of (seed, stream, i). There are as many as are asked for.

    `stream` tells training (0) from validation (1). Only numpy's raw Philox output is used, which, unlike the
    distributions built on it, is the same in every numpy release.
    """

    def __init__(
        self, *, vocab_size: int, sequence_length: int, seed: int, stream: int = 0, samples: int = ENDLESS
    ) -> None:
        self._samples = samples
        self._vocab_size = vocab_size
        self.sequence_length = sequence_length
        self._key = np.array([seed, stream], dtype=np.uint64)

    def __len__(self) -> int:
        return self._samples

    def sample(self, index: int) -> NDArray[np.int64]:
        """Sample `index`."""
        # The counter's low word counts blocks within a sample, the next one is the sample.
        generator = np.random.Philox(key=self._key, counter=np.array([0, index, 0, 0], dtype=np.uint64))
        words: NDArray[np.uint64] = generator.random_raw(self.sequence_length + 1)
        return (words % np.uint64(self._vocab_size)).astype(np.int64)

    def fill(
        self,
        indices: NDArray[np.int64],
        tokens: NDArray[np.int64],
        labels: NDArray[np.int64],
        at: NDArray[np.int64],
    ) -> tuple[int, int]:
        """Sample `indices[k]` into the rows `at[k]`."""
        for index, row in zip(indices.tolist(), at.tolist(), strict=True):
            sample = self.sample(index)
            tokens[row], labels[row] = sample[:-1], sample[1:]
        return 0, self._vocab_size - 1

    def announce(self, indices: NDArray[np.int64]) -> None:
        """Nothing is stored."""

    def boundaries_of(self, indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """None: a sample is one document."""
        return [self.boundaries(index) for index in indices.tolist()]

    def boundaries(self, index: int) -> NDArray[np.int64]:
        """None: a sample is one document."""
        return np.empty(0, dtype=np.int64)

    def source(self, index: int) -> str:
        return f"synthetic data (seed {self._key[0]})"
