"""Blends against a slow greedy reference: choices, counts, and addressing by position."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron.data import blend
from megatron.data.blend import (
    PERIOD,
    MegatronBlend,
    StableBlend,
    greedy_choices,
    integer_weights,
    member_samples,
    normalised,
)
from megatron.data.dataset import ENDLESS
from megatron.utils.errors import ConfigError

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


class Numbered:
    """Sample i of member m is [m, i]."""

    def __init__(self, member: int, length: int) -> None:
        self._member, self._length = member, length

    def __len__(self) -> int:
        return self._length

    def sample(self, index: int) -> NDArray[np.int64]:
        assert index < self._length, "the blend asked for more than the member has"
        return np.array([self._member, index])

    def boundaries(self, index: int) -> NDArray[np.int64]:
        return np.array([10 * self._member + index])

    def source(self, index: int) -> str:
        return f"member {self._member}, sample {index}"


def slow_blend(weights: list[float], samples: int) -> list[list[int]]:
    """[member, its sample] of each position, as Megatron defines it."""
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    counts = [0] * len(weights)
    positions = []
    for i in range(samples):
        lags = [share * max(float(i), 1.0) - count for share, count in zip(shares, counts, strict=True)]
        member = lags.index(max(lags))
        positions.append([member, counts[member]])
        counts[member] += 1
    return positions


def test_known_choices() -> None:
    counts = [0, 0]
    assert greedy_choices([0.7, 0.3], counts, 0, 9).tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert counts == [6, 3]


@given(weights=WEIGHTS, samples=st.integers(1, 120), block=st.integers(1, 50))
@settings(max_examples=150, deadline=None)
def test_megatron_blend_equals_the_slow_reference_and_never_exhausts_a_member(
    weights: list[float], samples: int, block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend, "_BLOCK", block)
        members = [
            Numbered(number, member_samples(samples, weight)) for number, weight in enumerate(normalised(weights))
        ]
        dataset = MegatronBlend(members, weights, samples=samples)
        assert len(dataset) == samples
        assert [dataset.sample(i).tolist() for i in range(samples)] == slow_blend(weights, samples)


def test_megatron_blend_is_addressed_in_any_order() -> None:
    members = [Numbered(0, 200_000), Numbered(1, 200_000), Numbered(2, 200_000)]
    weights, samples = [5.0, 2.0, 3.0], 140_000  # three blocks
    expected = slow_blend(weights, samples)
    backwards = MegatronBlend(members, weights, samples=samples)
    for index in (139_999, 70_000, 65_536, 65_535, 3, 0):
        assert backwards.sample(index).tolist() == expected[index]
    assert backwards.source(3) == f"member {expected[3][0]}, sample {expected[3][1]}"
    assert backwards.boundaries(3).tolist() == [10 * expected[3][0] + expected[3][1]]


def test_members_are_asked_for_megatrons_surplus() -> None:
    assert [member_samples(1000, 0.7), member_samples(1000, 0.3), member_samples(10, 0.5)] == [704, 302, 6]


@given(weights=WEIGHTS)
@settings(max_examples=100, deadline=None)
def test_integer_weights_sum_to_the_period_and_stay_close(weights: list[float]) -> None:
    shares = normalised(weights)
    rounded = integer_weights(shares)
    assert sum(rounded) == PERIOD
    assert all(abs(count - max(1.0, share * PERIOD)) <= 1 for count, share in zip(rounded, shares, strict=True))


def test_tiny_weights_still_get_a_place() -> None:
    rounded = integer_weights(normalised([1.0, 1e-9, 1e-9, 0.5]))
    assert sum(rounded) == PERIOD
    assert rounded[1:3] == [1, 1]


def test_stable_blend_repeats_its_table_and_continues_each_member() -> None:
    weights = [0.62, 0.08, 0.30]
    dataset = StableBlend([Numbered(number, ENDLESS) for number in range(3)], weights)
    assert len(dataset) == ENDLESS
    counts = [0, 0, 0]
    members = []
    for index in range(PERIOD):
        member, within = dataset.locate(index) if index % 97 == 0 else (int(dataset._table[index]), -1)
        assert within in (-1, counts[member])
        members.append(member)
        counts[member] += 1
    assert counts == dataset.weights
    for index in (0, 1, 12_345, PERIOD - 1):
        member, within = dataset.sample(5 * PERIOD + index).tolist()
        assert member == members[index]
        assert within == 5 * counts[member] + members[:index].count(member)
    lags = np.abs(np.cumsum(np.array(members) == 0) - np.arange(1, PERIOD + 1) * weights[0])
    assert lags.max() < 2  # never far from its share


@pytest.mark.parametrize("weights", [[], [0.5, 0.0], [1.0, -1.0], [math.nan], [math.inf, 1.0]])
def test_unusable_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="finite numbers above 0"):
        normalised(weights)
