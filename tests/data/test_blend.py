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
    Blend,
    Choices,
    MegatronChoices,
    StableChoices,
    Stage,
    integer_weights,
    member_samples,
    normalised,
)
from megatron.data.dataset import ENDLESS
from megatron.data.native import greedy_choices
from megatron.utils.errors import ConfigError

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


class Numbered:
    """Sample i of member m is [m, i]."""

    sequence_length = 1

    def __init__(self, member: int, length: int = ENDLESS) -> None:
        self._member, self._length = member, length
        self.announced: list[int] = []

    def __len__(self) -> int:
        return self._length

    def sample(self, index: int) -> NDArray[np.int64]:
        assert index < self._length, "the blend asked for more than the member has"
        return np.array([self._member, index])

    def fill(
        self, indices: NDArray[np.int64], tokens: NDArray[np.int64], labels: NDArray[np.int64], at: NDArray[np.int64]
    ) -> tuple[int, int]:
        for index, row in zip(indices.tolist(), at.tolist(), strict=True):
            tokens[row], labels[row] = self.sample(index)
        return 0, int(indices.max())

    def announce(self, indices: NDArray[np.int64]) -> None:
        self.announced += indices.tolist()

    def boundaries(self, index: int) -> NDArray[np.int64]:
        return np.array([10 * self._member + index])

    def boundaries_of(self, indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        return [self.boundaries(index) for index in indices.tolist()]

    def source(self, index: int) -> str:
        return f"member {self._member}, sample {index}"


def one_stage(choices: Choices, members: list[Numbered], samples: int = ENDLESS) -> Blend:
    return Blend(members, [Stage(0, choices, tuple(range(len(members))))], samples)


def read(blend: Blend, indices: list[int]) -> list[list[int]]:
    """The samples at these positions, read at once."""
    tokens, labels = np.full((2, len(indices), 1), -7)
    low, high = blend.fill(np.array(indices, dtype=np.int64), tokens, labels, np.arange(len(indices)))
    assert low == 0 and high == labels.max(initial=-1)
    return np.concatenate((tokens, labels), axis=1).tolist()


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


@given(weights=WEIGHTS, samples=st.integers(1, 120), block=st.integers(1, 50), kept=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_megatron_blend_equals_the_slow_reference_and_never_exhausts_a_member(
    weights: list[float], samples: int, block: int, kept: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend, "_BLOCK", block)
        patch.setattr(blend, "_BLOCKS_KEPT", kept)
        members = [
            Numbered(number, member_samples(samples, weight)) for number, weight in enumerate(normalised(weights))
        ]
        dataset = one_stage(MegatronChoices(weights), members, samples)
        assert len(dataset) == samples
        expected = slow_blend(weights, samples)
        assert read(dataset, list(range(samples))) == expected
        assert [dataset.sample(i).tolist() for i in reversed(range(samples))] == expected[::-1]
        for position in (0, samples // 2, samples - 1):
            before = [member for member, _ in expected[:position]]
            assert dataset.given(position) == [before.count(member) for member in range(len(weights))]


def test_megatron_blend_is_addressed_in_any_order() -> None:
    members = [Numbered(number, 200_000) for number in range(3)]
    weights, samples = [5.0, 2.0, 3.0], 140_000  # three blocks
    expected = slow_blend(weights, samples)
    backwards = one_stage(MegatronChoices(weights), members, samples)
    asked = [139_999, 70_000, 65_536, 65_535, 3, 0]
    assert read(backwards, asked) == [expected[index] for index in asked]
    assert backwards.source(3) == f"member {expected[3][0]}, sample {expected[3][1]}"
    assert backwards.boundaries(3).tolist() == [10 * expected[3][0] + expected[3][1]]
    found = backwards.boundaries_of(np.array(asked))
    assert [one.tolist() for one in found] == [[10 * expected[at][0] + expected[at][1]] for at in asked]
    backwards.announce(np.array(asked))
    assert sorted((number, index) for number, one in enumerate(members) for index in one.announced) == sorted(
        (member, index) for member, index in (expected[index] for index in asked)
    )


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
    choices = StableChoices(weights)
    dataset = one_stage(choices, [Numbered(number) for number in range(3)])
    assert len(dataset) == ENDLESS
    first = read(dataset, list(range(PERIOD)))
    members = [member for member, _ in first]
    counts = [0, 0, 0]
    for index, (member, within) in enumerate(first):
        assert within == counts[member], index
        counts[member] += 1
    assert counts == choices.weights
    for index in (0, 1, 12_345, PERIOD - 1):
        member, within = dataset.sample(5 * PERIOD + index).tolist()
        assert member == members[index]
        assert within == 5 * counts[member] + members[:index].count(member)
        assert dataset.given(5 * PERIOD + index) == [5 * counts[one] + members[:index].count(one) for one in range(3)]
    lags = np.abs(np.cumsum(np.array(members) == 0) - np.arange(1, PERIOD + 1) * weights[0])
    assert lags.max() < 2  # never far from its share


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    kind=st.sampled_from([MegatronChoices, StableChoices]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_stages_neither_repeat_nor_leave_out_a_sample(lengths: list[int], kind: type, seed: int) -> None:
    """Whatever members the stages draw on, with whatever weights: each member's samples come in turn, each once."""
    generator = np.random.default_rng(seed)
    members = [Numbered(number) for number in range(4)]
    stages, first = [], 0
    for length in lengths:
        drawn = tuple(generator.permutation(4)[: generator.integers(1, 5)].tolist())
        stages.append(Stage(first, kind(generator.uniform(0.1, 1, len(drawn)).tolist()), drawn))
        first += length
    dataset = Blend(members, stages)
    samples = read(dataset, list(range(first + 50)))
    counts = [0] * 4
    for position, (member, within) in enumerate(samples):
        assert within == counts[member]
        stage = [stage for stage in stages if stage.first <= position][-1]
        assert member in stage.members
        assert dataset.given(position) == counts
        counts[member] += 1
    alone = one_stage(stages[-1].choices, [members[member] for member in stages[-1].members])
    expected = [member for member, _ in read(alone, list(range(20)))]
    assert [member for member, _ in samples[stages[-1].first :][:20]] == expected, "each stage begins its rule anew"


@pytest.mark.parametrize("weights", [[], [0.5, 0.0], [1.0, -1.0], [math.nan], [math.inf, 1.0]])
def test_unusable_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="finite numbers above 0"):
        normalised(weights)
