"""Weighted blends of datasets: which member, and which of its samples, position i of the run is.

Both rules choose greedily, as Megatron does: position i goes to the member that lags most behind its share, the one
with the largest w·max(i, 1) − (samples it has given so far), the first of equals. For weights 0.7 and 0.3 that gives
0 1 0 0 1 0 0 1 0 0. This module must not know where the members' samples come from.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.data.dataset import ENDLESS, RowDataset, sample_of
from megatron.data.native import greedy_choices
from megatron.utils.errors import ConfigError

PERIOD = 65_536  # positions of the stable blend's table, and the sum of its integer weights
_BLOCK = 65_536  # positions of the megatron blend that are worked out at a time
_BLOCKS_KEPT = 4
_SURPLUS = 1.005  # how many more samples than its share Megatron asks of a member
_MAX_MEMBERS = 32_767


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights that sum to one. Raises ConfigError unless every weight is a finite number above zero."""
    if not weights or len(weights) > _MAX_MEMBERS or not all(math.isfinite(w) and w > 0 for w in weights):
        raise ConfigError(
            f"blend weights {list(weights)} are not 1 to {_MAX_MEMBERS:,} finite numbers above 0; "
            "leave out what is not wanted"
        )
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def member_samples(samples: int, weight: float) -> int:
    """Samples that a member with this normalised weight is built for in a `megatron` blend of `samples`."""
    return math.ceil(samples * weight * _SURPLUS)


class Choices(Protocol):
    """Which member each position goes to."""

    @property
    def members(self) -> int: ...

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(member, which of its samples) of each position."""
        ...

    def given(self, position: int) -> list[int]:
        """How many samples each member has given before `position`."""
        ...


class _Table:
    """The choices of a run of positions, and of each how many before it went to the same member: 4 bytes a position."""

    def __init__(self, choices: NDArray[np.int16], members: int) -> None:
        self.choices = choices
        by_member = np.argsort(choices, kind="stable")
        counts = np.bincount(choices, minlength=members)
        ranks = np.arange(len(choices)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.ranks = np.empty(len(choices), dtype=np.uint16)
        self.ranks[by_member] = ranks

    def given(self, within: int, members: int) -> NDArray[np.int64]:
        return np.bincount(self.choices[:within], minlength=members)


class MegatronChoices:
    """Megatron's choices, each of which depends on all those before it.

    They are worked out in blocks as they are needed, and what each member had given before a block is kept. Members
    must hold `member_samples(samples, weight)` samples each: the rule never asks for more.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = normalised(weights)
        self.members = len(self._weights)
        self._before: list[list[int]] = [[0] * self.members]  # of each block: what each member gave before it
        self._tables: dict[int, _Table] = {}
        self._lock = threading.Lock()  # the loader's thread asks, and who keeps the ledger

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(member, which of its samples) of each position."""
        blocks, within = np.divmod(positions, _BLOCK)
        members, samples = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            table = self._table(block)
            chosen = table.choices[within[here]].astype(np.int64)
            members[here] = chosen
            samples[here] = np.asarray(self._before[block])[chosen] + table.ranks[within[here]]
        return members, samples

    def given(self, position: int) -> list[int]:
        """How many samples each member has given before `position`."""
        block, within = divmod(position, _BLOCK)
        counts = self._table(block).given(within, self.members) + np.asarray(self._before[block])
        return [int(count) for count in counts]

    def _table(self, block: int) -> _Table:
        with self._lock:
            while len(self._before) <= block:
                self._work_out(len(self._before) - 1)
            if block not in self._tables:
                self._work_out(block)
            return self._tables[block]

    def _work_out(self, block: int) -> None:
        counts = list(self._before[block])
        choices = greedy_choices(self._weights, counts, block * _BLOCK, (block + 1) * _BLOCK)
        if block + 1 == len(self._before):
            self._before.append(counts)
        while len(self._tables) >= _BLOCKS_KEPT:
            del self._tables[next(iter(self._tables))]
        self._tables[block] = _Table(choices, self.members)


class StableChoices:
    """Choices addressed by position: integer weights that sum to 65,536 and one greedy table of that period.

    The table, 4 bytes a position, is all there is, whatever the length of the run.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = integer_weights(normalised(weights))
        self.members = len(self.weights)
        counts = [0] * self.members
        choices = greedy_choices([weight / PERIOD for weight in self.weights], counts, 0, PERIOD)
        assert counts == self.weights, "a greedy period gives every member exactly its weight"
        self._table = _Table(choices, self.members)

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(member, which of its samples) of each position."""
        periods, within = np.divmod(positions, PERIOD)
        members = self._table.choices[within].astype(np.int64)
        return members, periods * np.asarray(self.weights)[members] + self._table.ranks[within]

    def given(self, position: int) -> list[int]:
        """How many samples each member has given before `position`."""
        periods, within = divmod(position, PERIOD)
        return [int(count) for count in self._table.given(within, self.members) + periods * np.asarray(self.weights)]


@dataclass(frozen=True)
class Stage:
    """From sample `first` of the run on, `choices` among these `members` of the blend."""

    first: int
    choices: Choices
    members: tuple[int, ...]


class Blend:
    """Samples of several members, by the choices of one stage after the other.

    A member that several stages draw on goes on in each where it was in the one before: no sample is repeated or left
    out. It holds `samples`, or is endless if its members are.
    """

    def __init__(self, members: Sequence[RowDataset], stages: Sequence[Stage], samples: int = ENDLESS) -> None:
        assert stages[0].first == 0 and all(len(stage.members) == stage.choices.members for stage in stages)
        self.parts = list(members)
        self.sequence_length = members[0].sequence_length
        self._stages = list(stages)
        self._samples = samples
        self._firsts = np.array([stage.first for stage in stages])
        before = [0] * len(members)
        self._before = [list(before)]  # of each stage: what each member has given before it
        for stage, following in pairwise(stages):
            for member, count in zip(stage.members, stage.choices.given(following.first - stage.first), strict=True):
                before[member] += count
            self._before.append(list(before))

    def __len__(self) -> int:
        return self._samples

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(member, which of its samples) of each position."""
        numbers = np.searchsorted(self._firsts, positions, side="right") - 1
        members, samples = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            stage, here = self._stages[number], numbers == number
            chosen, within = stage.choices.locate(positions[here] - stage.first)
            members[here] = np.asarray(stage.members)[chosen]
            samples[here] = np.asarray(self._before[number])[members[here]] + within
        return members, samples

    def locate_one(self, index: int) -> tuple[RowDataset, int]:
        """The member that position `index` goes to, and which of its samples it is."""
        assert 0 <= index < self._samples, (index, self._samples)
        members, samples = self.locate(np.array([index]))
        return self.parts[int(members[0])], int(samples[0])

    def given(self, position: int) -> list[int]:
        """How many samples each member has given before `position`."""
        number = int(np.searchsorted(self._firsts, position, side="right")) - 1
        stage, counts = self._stages[number], list(self._before[number])
        for member, count in zip(stage.members, stage.choices.given(position - stage.first), strict=True):
            counts[member] += count
        return counts

    def sample(self, index: int) -> NDArray[np.int64]:
        """The sample at position `index`."""
        return sample_of(self, index)

    def fill(
        self,
        indices: NDArray[np.int64],
        tokens: NDArray[np.int64],
        labels: NDArray[np.int64],
        at: NDArray[np.int64],
    ) -> tuple[int, int]:
        """The samples at these positions into the rows `at`."""
        members, samples = self.locate(indices)
        low, high = 0, -1
        for member in np.unique(members).tolist():
            here = members == member
            lowest, highest = self.parts[member].fill(samples[here], tokens, labels, at[here])
            low, high = min(low, lowest), max(high, highest)
        return low, high

    def announce(self, indices: NDArray[np.int64]) -> None:
        """The samples at these positions will be read soon."""
        members, samples = self.locate(indices)
        for member in np.unique(members).tolist():
            self.parts[member].announce(samples[members == member])

    def boundaries(self, index: int) -> NDArray[np.int64]:
        """Where in the sample at position `index` documents begin."""
        return self.boundaries_of(np.array([index]))[0]

    def boundaries_of(self, indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The same of each of these positions."""
        members, samples = self.locate(indices)
        found: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)] * len(indices)
        for member in np.unique(members).tolist():
            here = np.flatnonzero(members == member)
            for at, begins in zip(here.tolist(), self.parts[member].boundaries_of(samples[here]), strict=True):
                found[at] = begins
        return found

    def source(self, index: int) -> str:
        member, within = self.locate_one(index)
        return member.source(within)


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Normalised weights in units of 1/65,536, at least one each, by largest remainders (the first of equals)."""
    exact = [weight * PERIOD for weight in weights]
    rounded = [max(1, math.floor(share)) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda member: rounded[member] - exact[member])
    while (missing := PERIOD - sum(rounded)) != 0:
        if missing > 0:
            for member in by_remainder[:missing]:
                rounded[member] += 1
        else:  # members raised to one took more than there was: the largest give it back
            rounded[rounded.index(max(rounded))] -= 1
    return rounded
