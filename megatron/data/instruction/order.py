"""Which conversation comes at each position of a run: all of a part once per epoch, in one of two orders.

Positions are all there is of state. This module knows lengths and numbers of conversations, not what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.data.blend import Choices
from megatron.data.dataset import ENDLESS
from megatron.data.order import KeyedPermutation


class Epochs(Protocol):
    """The conversations of a part of a pair, all of them in each epoch."""

    @property
    def size(self) -> int:
        """Conversations in an epoch."""
        ...

    @property
    def limit(self) -> int:
        """Positions that there are, `ENDLESS` where epoch follows epoch."""
        ...

    def of(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which conversation of the pair comes at these places of an epoch."""
        ...


class InOrder:
    """One epoch of the part as it is: what is evaluated."""

    def __init__(self, part: NDArray[np.int64]) -> None:
        self._part = part
        self.size = self.limit = len(part)

    def of(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which conversation comes at these places of the one epoch."""
        assert epoch == 0, epoch
        return self._part[places]


class MegatronEpochs:
    """Megatron-LLM's sampling: each epoch is one more permutation of the part from the same `RandomState`.

    An epoch does not depend on how many samples are asked for. To go back, permutations are drawn again from the first.
    """

    limit = ENDLESS

    def __init__(self, part: NDArray[np.int64], generator: np.random.RandomState) -> None:
        self._part, self._generator = part, generator
        self._begin = generator.get_state()
        self._drawn: dict[int, NDArray[np.int64]] = {}  # the last two
        self._next = 0
        self.size = len(part)

    def of(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which conversation comes at these places of an epoch."""
        if epoch < self._next and epoch not in self._drawn:
            self._generator.set_state(self._begin)
            self._drawn, self._next = {}, 0
        while self._next <= epoch:
            self._drawn.pop(self._next - 2, None)
            self._drawn[self._next] = self._generator.permutation(self._part)
            self._next += 1
        return self._drawn[epoch][places]


class StableEpochs:
    """Permutations of the part that are computed, keyed by seed and epoch: any of them at once."""

    limit = ENDLESS

    def __init__(self, part: NDArray[np.int64], seed: int) -> None:
        self._part, self._seed = part, seed
        self.size = len(part)

    def of(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which conversation comes at these places of an epoch."""
        return self._part[KeyedPermutation(self.size, seed=self._seed, epoch=epoch).of(places)]


class Order:
    """The conversations of a run: position → (member, its conversation), by the `choices` of a blend among members."""

    def __init__(self, members: Sequence[Epochs], choices: Choices | None = None) -> None:
        assert choices is not None or len(members) == 1
        self._members, self._choices = list(members), choices

    def __len__(self) -> int:
        return self._members[0].limit if self._choices is None else ENDLESS

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(member, which of its pair's conversations) of each position."""
        if self._choices is None:
            members, samples = np.zeros_like(positions), positions
        else:
            members, samples = self._choices.locate(positions)
        sequences = np.empty_like(positions)
        for member in np.unique(members).tolist():
            epochs = self._members[member]
            of_member = np.flatnonzero(members == member)
            numbers, places = np.divmod(samples[of_member], epochs.size)
            for number in np.unique(numbers).tolist():
                of_epoch = numbers == number
                sequences[of_member[of_epoch]] = epochs.of(number, places[of_epoch])
        return members, sequences


def megatron_part(
    sequences: int, bounds: tuple[int, int] | None, seed: int
) -> tuple[NDArray[np.int64], np.random.RandomState]:
    """The conversations of a part, and the generator in the state in which Megatron-LLM samples training data.

    With a split (`bounds` of the part) conversations are permuted before they are divided; without, a part is all.
    """
    generator = np.random.RandomState(seed)
    if bounds is None:
        return np.arange(sequences), generator
    return generator.permutation(sequences)[slice(*bounds)], generator
