"""What every dataset offers, and how samples of any of them come into rows."""

from __future__ import annotations

import sys
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

PADDING = -1  # in a sample: no token here, and no prediction of it
ENDLESS = sys.maxsize  # the length of a dataset that never runs out


class Dataset(Protocol):
    """Samples addressed by position. Nothing but the position is state, so resuming is exact."""

    def __len__(self) -> int:
        """Samples that can be addressed; `ENDLESS` where there is no limit."""
        ...

    def sample(self, index: int) -> NDArray[np.int64]:
        """Sample `index`: i64[sequence_length + 1] tokens, `PADDING` past the end of a short one."""
        ...

    def boundaries(self, index: int) -> NDArray[np.int64]:
        """Where in sample `index` documents begin behind its first token, ascending, each once."""
        ...

    def source(self, index: int) -> str:
        """Where a sample comes from, in words for an error message."""
        ...


@runtime_checkable
class RowDataset(Dataset, Protocol):
    """A dataset whose samples are all of one length, and which reads many at once: what is fast."""

    @property
    def sequence_length(self) -> int: ...

    def fill(
        self,
        indices: NDArray[np.int64],
        tokens: NDArray[np.int64],
        labels: NDArray[np.int64],
        at: NDArray[np.int64],
    ) -> tuple[int, int]:
        """Sample `indices[k]` into the rows `at[k]` of `tokens` and `labels`, both i64[n, sequence_length] and
        contiguous: all but its last token, all but its first. The lowest (`PADDING` where one is short) and the highest
        of its tokens."""
        ...

    def boundaries_of(self, indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """`boundaries` of each of these samples."""
        ...

    def announce(self, indices: NDArray[np.int64]) -> None:
        """These samples will be read soon: let the system fetch them meanwhile."""
        ...


def sample_of(dataset: RowDataset, index: int) -> NDArray[np.int64]:
    """One sample of a dataset that fills rows."""
    tokens, labels = np.empty((2, 1, dataset.sequence_length), dtype=np.int64)
    dataset.fill(np.array([index]), tokens, labels, np.zeros(1, dtype=np.int64))
    return np.append(tokens[0], labels[0, -1])
