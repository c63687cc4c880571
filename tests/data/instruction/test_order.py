"""Which conversation comes when: Megatron-LLM's permutations, and the stable ones."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron.data.blend import StableChoices
from megatron.data.dataset import ENDLESS
from megatron.data.instruction.order import InOrder, MegatronEpochs, Order, StableEpochs, megatron_part


def sampled_by_megatron_llm(generator: np.random.RandomState, subset: NDArray[np.int64], count: int) -> list[int]:
    """Whole permutations, the last one cut, until there are as many as asked for."""
    found: list[int] = []
    while len(found) < count:
        found += generator.permutation(subset)[: count - len(found)].tolist()
    return found


def all_of(order: Order, count: int) -> list[int]:
    return order.locate(np.arange(count))[1].tolist()


@pytest.mark.parametrize("count", [1, 7, 10, 11, 47])
def test_megatron_llms_sampling_without_a_split(count: int) -> None:
    part, generator = megatron_part(10, None, 1234)
    expected = sampled_by_megatron_llm(np.random.RandomState(1234), np.arange(10, dtype=np.int32), count)
    assert all_of(Order([MegatronEpochs(part, generator)]), count) == expected


def test_megatron_llms_sampling_of_a_part() -> None:
    reference = np.random.RandomState(7)
    shuffled = reference.permutation(100)
    expected = sampled_by_megatron_llm(reference, shuffled[:97], 300)
    part, generator = megatron_part(100, (0, 97), 7)
    assert all_of(Order([MegatronEpochs(part, generator)]), 300) == expected
    validation, _ = megatron_part(100, (97, 100), 7)
    assert validation.tolist() == shuffled[97:].tolist()


@pytest.mark.parametrize("kind", ["megatron", "stable"])
def test_every_epoch_has_all_of_the_part_once_from_wherever_it_is_entered(kind: str) -> None:
    def order() -> Order:
        part, generator = megatron_part(50, (3, 40), 5)
        return Order([MegatronEpochs(part, generator) if kind == "megatron" else StableEpochs(part, 5)])

    found = np.array(all_of(order(), 5 * 37)).reshape(5, 37)
    assert len({tuple(epoch) for epoch in found.tolist()}) == 5
    assert all(sorted(epoch) == sorted(found[0]) for epoch in found.tolist()) and len(set(found[0].tolist())) == 37
    assert len(order()) == ENDLESS
    entered = order()
    for position in (150, 20, 184, 36, 37, 0):  # forward and back
        assert entered.locate(np.array([position]))[1].tolist() == [found.reshape(-1)[position]]


def test_a_blend_takes_from_each_member_in_its_order() -> None:
    parts = [np.arange(4), np.arange(10)]
    order = Order([StableEpochs(part, 3) for part in parts], StableChoices([0.25, 0.75]))
    members, sequences = order.locate(np.arange(32))
    assert np.bincount(members).tolist() == [8, 24]
    for member, part in enumerate(parts):
        alone = all_of(Order([StableEpochs(part, 3)]), 24)
        assert sequences[members == member].tolist() == alone[: np.count_nonzero(members == member)]


def test_what_is_evaluated_stays_in_order() -> None:
    order = Order([InOrder(np.array([4, 2, 9]))])
    assert len(order) == 3 and all_of(order, 3) == [4, 2, 9]
