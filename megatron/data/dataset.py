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

    def fill(self, indices: NDArray[np.int64], rows: NDArray[np.int64], at: NDArray[np.int64]) -> None:
        """Sample `indices[k]` into `rows[at[k]]`, rows being i64[n, sequence_length + 1] and contiguous."""
        ...

    def announce(self, indices: NDArray[np.int64]) -> None:
        """These samples will be read soon: let the system fetch them meanwhile."""
        ...


def sample_of(dataset: RowDataset, index: int) -> NDArray[np.int64]:
    """One sample of a dataset that fills rows."""
    row = np.empty((1, dataset.sequence_length + 1), dtype=np.int64)
    dataset.fill(np.array([index]), row, np.zeros(1, dtype=np.int64))
    return row[0]
