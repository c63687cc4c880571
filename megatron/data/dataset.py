"""What every dataset offers, and the checks on a window of tokens that they share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.utils.errors import DataError

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


def to_sample(tokens: NDArray[np.integer], sequence_length: int, source: Callable[[], str]) -> NDArray[np.int64]:
    """i64[sequence_length + 1] from at most that many stored tokens, padded with `PADDING`.

    Raises DataError for a negative stored token, which could otherwise pass for padding.
    """
    sample = np.full(sequence_length + 1, PADDING, dtype=np.int64)
    sample[: len(tokens)] = tokens
    if tokens.dtype.kind == "i" and len(tokens) and tokens.min() < 0:
        raise DataError(f"{source()} holds the token {tokens.min()}; tokens are not negative, so the data are damaged")
    return sample
