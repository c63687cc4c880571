"""Rows of conversations: first-fit decreasing as it is defined, each conversation once, found again from a number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron.data.instruction.packing import Packing, first_fit_decreasing, window_for


def as_defined(lengths: list[int], capacity: int) -> list[list[int]]:
    """Each item, the longest first, to the first row with room for it."""
    rows: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        for row in rows:
            if sum(lengths[other] for other in row) + lengths[item] <= capacity:
                row.append(item)
                break
        else:
            rows.append([item])
    return rows


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 64))
def test_rows_are_those_of_first_fit_decreasing(lengths: list[int], capacity: int) -> None:
    assert first_fit_decreasing(np.array(lengths, dtype=np.int64), capacity) == as_defined(lengths, capacity)


def lengths_of(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Long-tailed, a few zero, some cut to the capacity: a function of the position."""
    return np.minimum((positions * 7919 % 101) ** 2 // 40, 256)


def packing(positions: int = 10**9, window: int = 500, seed: int = 3) -> Packing:
    return Packing(lengths_of, positions, capacity=256, window=window, seed=seed)


def test_each_conversation_is_in_one_row_which_holds_it() -> None:
    packed = packing(positions=2345)
    rows = [packed.row(index) for index in range(packed.count())]
    positions = np.arange(2345)
    assert sorted(position for row in rows for position in row) == positions[lengths_of(positions) > 0].tolist()
    filled = [int(lengths_of(np.array(row)).sum()) for row in rows]
    assert max(filled) <= 256 and sum(filled) > 0.97 * 256 * len(rows)


def test_a_row_is_found_again_from_its_number() -> None:
    going_on = packing()
    rows = [going_on.row(index) for index in range(900)]
    for index in (899, 0, 450, 451, 898):
        assert packing().row(index) == going_on.row(index) == rows[index]
    assert packing(seed=4).row(0) != rows[0]


def test_rows_of_a_window_come_in_no_order_of_length() -> None:
    """Trained on in the order in which they are packed, the longest conversations would come first."""
    packed = packing()
    counts = [len(packed.row(index)) for index in range(100)]
    halves = np.mean(counts[:50]), np.mean(counts[50:])
    assert counts != sorted(counts) and abs(halves[0] - halves[1]) < 0.5 * np.mean(counts)


def test_the_count_stops_where_it_is_told_to() -> None:
    assert packing().count(10) == 10
    assert packing(positions=3).count(10) == len(as_defined(lengths_of(np.arange(3)).tolist(), 256))
    assert Packing(np.zeros_like, 40, capacity=4, window=7, seed=0).count() == 0


@pytest.mark.parametrize("capacity", [512, 4096, 131_072])
def test_padding_is_below_three_per_cent(capacity: int) -> None:
    """Lengths as instruction data have them: log-normal about 300 tokens; whatever the length of a row."""
    chance = np.random.default_rng(1)
    lengths = np.minimum(chance.lognormal(5.3, 0.9, 120_000).astype(np.int64) + 1, capacity)
    window = window_for(capacity, float(lengths.mean()))
    packed = Packing(lambda positions: lengths[positions], len(lengths), capacity=capacity, window=window, seed=0)
    rows = packed.count()
    assert 1 - lengths.sum() / (capacity * rows) < 0.03
