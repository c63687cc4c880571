"""Weighted blends of datasets: which member, and which of its samples, position i of the run is.

Both blends choose greedily, as Megatron does: position i goes to the member that lags most behind its share, the one
with the largest w·max(i, 1) − (samples it has given so far), the first of equals. For weights 0.7 and 0.3 that gives
0 1 0 0 1 0 0 1 0 0. This module must not know where the members' samples come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron.data.dataset import ENDLESS, Dataset
from megatron.utils.errors import ConfigError

PERIOD = 65_536  # positions of the stable blend's table, and the sum of its integer weights
_BLOCK = 65_536  # positions of the megatron blend that are worked out at a time
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


def greedy_choices(weights: Sequence[float], counts: list[int], start: int, stop: int) -> NDArray[np.int16]:
    """The member chosen at each position `start … stop`; `counts`, what each has given before, is brought up to date.

    In double arithmetic, as Megatron computes it, so that ties and near-ties fall alike.
    """
    choices = np.empty(stop - start, dtype=np.int16)
    given = [float(count) for count in counts]
    positions = np.maximum(np.arange(start, stop), 1).astype(np.float64)
    shares = np.multiply.outer(positions, np.asarray(weights, dtype=np.float64)).tolist()  # [positions][members]
    for at, share in enumerate(shares):
        best, lag = 0, share[0] - given[0]
        for member in range(1, len(given)):
            other = share[member] - given[member]
            if other > lag:
                best, lag = member, other
        choices[at] = best
        given[best] += 1.0
    counts[:] = [int(count) for count in given]
    return choices


class MegatronBlend:
    """Megatron's blend for a known number of samples.

    A choice depends on all those before it, so they are worked out in blocks as they are needed (about a microsecond
    and two bytes of memory per position) instead of all at the start. Members must hold
    `member_samples(samples, weight)` samples each: the greedy rule never asks for more.
    """

    def __init__(self, members: Sequence[Dataset], weights: Sequence[float], *, samples: int) -> None:
        self._members = list(members)
        self._weights = normalised(weights)
        self._samples = samples
        assert len(self._members) == len(self._weights)
        for member, weight in zip(self._members, self._weights, strict=True):
            assert len(member) >= member_samples(samples, weight), (len(member), samples, weight)
        self._blocks: list[NDArray[np.int16]] = []
        self._counts_before: list[list[int]] = []  # of each block: what each member gave before it
        self._counts = [0] * len(self._members)

    def __len__(self) -> int:
        return self._samples

    def locate(self, index: int) -> tuple[int, int]:
        """(member, its sample) of position `index`."""
        assert 0 <= index < self._samples, (index, self._samples)
        block, within = divmod(index, _BLOCK)
        while len(self._blocks) <= block:
            start = len(self._blocks) * _BLOCK
            self._counts_before.append(list(self._counts))
            stop = min(start + _BLOCK, self._samples)
            self._blocks.append(greedy_choices(self._weights, self._counts, start, stop))
        return _locate(self._blocks[block], self._counts_before[block], within)

    def sample(self, index: int) -> NDArray[np.int64]:
        """The sample at position `index`."""
        member, within = self.locate(index)
        return self._members[member].sample(within)

    def boundaries(self, index: int) -> NDArray[np.int64]:
        """Where in the sample at position `index` documents begin."""
        member, within = self.locate(index)
        return self._members[member].boundaries(within)

    def source(self, index: int) -> str:
        member, within = self.locate(index)
        return self._members[member].source(within)


class StableBlend:
    """An endless blend addressed by position: integer weights that sum to 65,536 and one greedy table of that period.

    Its state is the table, whatever the length of the run; members must be endless too.
    """

    def __init__(self, members: Sequence[Dataset], weights: Sequence[float]) -> None:
        self._members = list(members)
        self.weights = integer_weights(normalised(weights))
        assert len(self._members) == len(self.weights)
        assert all(len(member) == ENDLESS for member in self._members)
        counts = [0] * len(self.weights)
        self._table = greedy_choices([weight / PERIOD for weight in self.weights], counts, 0, PERIOD)
        assert counts == self.weights, "a greedy period gives every member exactly its weight"

    def __len__(self) -> int:
        return ENDLESS

    def locate(self, index: int) -> tuple[int, int]:
        """(member, its sample) of position `index`."""
        period, within = divmod(index, PERIOD)
        return _locate(self._table, [period * weight for weight in self.weights], within)

    def sample(self, index: int) -> NDArray[np.int64]:
        """The sample at position `index`."""
        member, within = self.locate(index)
        return self._members[member].sample(within)

    def boundaries(self, index: int) -> NDArray[np.int64]:
        """Where in the sample at position `index` documents begin."""
        member, within = self.locate(index)
        return self._members[member].boundaries(within)

    def source(self, index: int) -> str:
        member, within = self.locate(index)
        return self._members[member].source(within)


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


def _locate(choices: NDArray[np.int16], counts_before: list[int], within: int) -> tuple[int, int]:
    member = int(choices[within])
    return member, counts_before[member] + int(np.count_nonzero(choices[:within] == member))
