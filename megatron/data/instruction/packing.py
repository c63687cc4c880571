"""Packing conversations into rows of one length: first-fit decreasing, within windows of the order.

Source: Johnson, "Near-optimal bin packing algorithms", 1973. A window's rows depend on the lengths of its
conversations alone, so all that a position means is found again from it, without a token being read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from megatron.data.dataset import ENDLESS
from megatron.data.order import KeyedPermutation

_FEWEST, _MOST = 8192, 65536  # conversations that are packed together
_ROWS = 128  # that a window is to have, if possible: its last one is seldom full
_WINDOWS_KEPT = 4

Row = list[int]  # positions in the order


def first_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Rows of items, numbered as in `lengths` (of which none is above `capacity`), whose lengths add up to at most
    `capacity`.

    Items in the order of falling length, the first of equals first, each go to the first row that they fit into. That
    fills row after row with, each time, the longest item left that fits: which is what is done here.
    """
    count = len(lengths)
    # Ascending; of equal lengths the first item is last, where it is found first.
    keys = np.sort(lengths * count + (count - 1 - np.arange(count))).tolist()
    rows = []
    while keys:
        row, space = [], capacity
        while (at := bisect_right(keys, space * count + count - 1)) > 0:
            length, behind = divmod(keys.pop(at - 1), count)
            row.append(count - 1 - behind)
            space -= length
        rows.append(row)
    return rows


def window_for(capacity: int, mean_length: float) -> int:
    """How many conversations to pack together, given the capacity of a row and the mean of their lengths."""
    return round(min(max(_ROWS * capacity / mean_length, _FEWEST), _MOST))


class Packing:
    """Which positions of an order make up each row, packed window by window; rows of a window come in a random order,
    keyed by the seed, since the longest conversations would else come first.

    `lengths` gives the lengths of the conversations at some positions, at most `capacity`; those of length 0 are left
    out. `positions` is how many there are, and `window` how many are packed together. Finding a row works out the
    windows before it, once.
    """

    def __init__(
        self,
        lengths: Callable[[NDArray[np.int64]], NDArray[np.int64]],
        positions: int,
        *,
        capacity: int,
        window: int,
        seed: int,
    ) -> None:
        self._lengths, self._positions, self._capacity, self._seed = lengths, positions, capacity, seed
        self._window_size = window
        self._firsts = [0]  # of each window that was worked out, and of the one behind them, the first row
        self._kept: dict[int, list[Row]] = {}

    def row(self, index: int) -> Row:
        """The positions of row `index`, in the order in which they lie in it."""
        while self._firsts[-1] <= index:
            found = self._next_window()
            assert found, f"there is no row {index}"
        window = bisect_right(self._firsts, index) - 1
        return self._window(window)[index - self._firsts[window]]

    def count(self, most: int = ENDLESS) -> int:
        """How many rows there are, or `most` if there are as many. Not to be asked of an endless order without one."""
        while self._firsts[-1] < most and self._next_window():
            pass
        return min(self._firsts[-1], most)

    def _next_window(self) -> bool:
        """Work out one more window; False if there is none."""
        window = len(self._firsts) - 1
        if window * self._window_size >= self._positions:
            return False
        self._firsts.append(self._firsts[-1] + len(self._window(window)))
        return True

    def _window(self, window: int) -> list[Row]:
        if window not in self._kept:
            while len(self._kept) >= _WINDOWS_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[window] = self._pack(window)
        return self._kept[window]

    def _pack(self, window: int) -> list[Row]:
        first = window * self._window_size
        positions = np.arange(first, min(first + self._window_size, self._positions))
        lengths = self._lengths(positions)
        positions, lengths = positions[lengths > 0], lengths[lengths > 0]
        rows = first_fit_decreasing(lengths, self._capacity)
        if not rows:
            return []
        places = KeyedPermutation(len(rows), seed=self._seed, epoch=window).of(np.arange(len(rows)))
        return [positions[rows[place]].tolist() for place in places.tolist()]
