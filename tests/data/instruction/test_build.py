"""From the `data` section to datasets of conversations: orders, blends, splits, fixed validation sets, and warnings."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from megatron.config.data import DataConfig
from megatron.data.blend import MegatronChoices
from megatron.data.instruction.build import (
    build_instruction_training,
    build_instruction_validation,
    open_instruction_sources,
)
from megatron.data.instruction.dataset import InstructionDataset
from megatron.utils.errors import DataError

from .conftest import MakeConversations


def numbered(first: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Conversations that are told apart by their first token."""
    return [([first + number, 1, 2, 3], [1, 1, 2, 2]) for number in range(count)]


def config_of(**fields: Any) -> DataConfig:
    return DataConfig(kind="instruction", **fields)


def training(config: DataConfig, sequence_length: int = 16) -> InstructionDataset:
    return build_instruction_training(config, sequence_length=sequence_length, vocab_size=1000, length_unit=1)


def firsts(dataset: InstructionDataset, count: int) -> list[int]:
    return [int(dataset.micro_batches(np.array([[row]]))[0].tokens[0, 0]) for row in range(count)]


def test_the_megatron_order_is_megatron_llms(make_conversations: MakeConversations) -> None:
    prefix = make_conversations(numbered(10, 20))
    generator = np.random.RandomState(7)
    expected = [10 + number for _ in range(3) for number in generator.permutation(20).tolist()]
    assert firsts(training(config_of(train=prefix, seed=7)), 60) == expected
    generator = np.random.RandomState(7)
    part = generator.permutation(20)[:15]
    expected = [10 + number for _ in range(2) for number in generator.permutation(part).tolist()]
    assert firsts(training(config_of(train=prefix, seed=7, split="3,1,0")), 30) == expected


@pytest.mark.parametrize("order", ["megatron", "stable"])
def test_a_blend_draws_on_its_members_by_weight(make_conversations: MakeConversations, order: str) -> None:
    prefixes = [make_conversations(numbered(first, 20), name) for first, name in ((100, "a"), (200, "b"))]
    weighted = config_of(train=((3.0, prefixes[0]), (1.0, prefixes[1])), order=order)
    found = np.array(firsts(training(weighted), 80)) // 100
    assert np.bincount(found).tolist() == [0, 60, 20]
    if order == "megatron":
        members, _ = MegatronChoices([0.75, 0.25]).locate(np.arange(80))
        assert found.tolist() == (members + 1).tolist()
    by_size = config_of(train=((None, prefixes[0]), (None, make_conversations(numbered(300, 60), "c"))), order=order)
    assert list(open_instruction_sources(by_size).weights) == [80.0, 240.0]
    assert open_instruction_sources(by_size).describe()[1] == {"weight": 240.0, "sequences": 60, "tokens": 240}


def test_validation_is_a_fixed_set_of_each_source(make_conversations: MakeConversations) -> None:
    one, other = (make_conversations(numbered(first, 20), name) for first, name in ((100, "a"), (200, "b")))

    def sets(**fields: Any) -> dict[str, list[int]]:
        built = build_instruction_validation(
            config_of(**fields), sequence_length=16, samples=8, vocab_size=1000, length_unit=1
        )
        return {name: firsts(dataset, len(dataset)) for name, dataset in built}

    assert sets(train=one) == {}
    assert sets(train=one, validation=other) == {"b": list(range(200, 208))}
    assert sets(validation=((3.0, one), (1.0, other))) == {"a": list(range(100, 106)), "b": [200, 201]}
    shuffled = (100 + np.random.RandomState(1234).permutation(20)).tolist()
    assert sets(train=one, split="17,2,1") == {"a": shuffled[17:19]}
    with pytest.raises(DataError, match=r"leaves no conversation of data.train for validation"):
        sets(train=one, split="1,0,0")
    with pytest.raises(DataError, match=r"leaves none of the 20 conversations of .*a for training"):
        training(config_of(train=one, split="0,1,0"))


def test_packed_validation_has_whole_rows(make_conversations: MakeConversations) -> None:
    prefix = make_conversations(numbered(100, 20))
    ((_, dataset),) = build_instruction_validation(
        config_of(validation=prefix, packing=True), sequence_length=16, samples=3, vocab_size=1000, length_unit=1
    )
    assert len(dataset) == 3 and all(len(dataset.conversations(row)) == 5 for row in range(3))


def test_what_is_cut_off_is_counted(make_conversations: MakeConversations, caplog: pytest.LogCaptureFixture) -> None:
    lengths = [5, 17, 18, 30]
    prefix = make_conversations([([1] * length, [2] * length) for length in lengths])
    with caplog.at_level(logging.WARNING):
        logging.getLogger("megatron").addHandler(caplog.handler)
        try:
            training(config_of(train=prefix))
            assert "2 of the 4 conversations of" in caplog.text and "the longest has 30" in caplog.text
            assert "their ends, 14 tokens, are cut off" in caplog.text
            caplog.clear()
            training(config_of(train=prefix), sequence_length=29)
            assert not caplog.text
        finally:
            logging.getLogger("megatron").removeHandler(caplog.handler)
