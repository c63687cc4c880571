"""Micro-batches of conversations: every token and weight by the rules, padded and packed, and the same loss of both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from megatron.data.instruction.dataset import Batching, InstructionDataset
from megatron.data.instruction.order import InOrder, Order, StableEpochs
from megatron.data.instruction.pair import ConversationPair
from megatron.data.loader import BatchLoader, MicroBatch
from megatron.evaluate.perplexity import evaluate
from megatron.model.config import ModelConfig
from megatron.model.initialize import initialize
from megatron.model.loss import IGNORED
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank
from megatron.utils.errors import DataError

from .conftest import Conversation, MakeConversations

VOCABULARY = 50
MODEL = ModelConfig(VOCABULARY, 24, 40, 2, 4, 2, 6, initializer_range=0.3)


def random_conversations(count: int, longest: int) -> list[Conversation]:
    """Of 0 to `longest` tokens: a system's, a prompter's, an assistant's, perhaps several turns."""
    chance = np.random.default_rng(0)
    found: list[Conversation] = []
    for _ in range(count):
        length = int(chance.integers(0, longest + 1))
        roles = np.sort(chance.integers(0, 3, length)) if chance.random() < 0.7 else chance.integers(0, 3, length)
        found.append((chance.integers(0, VOCABULARY, length).tolist(), roles.tolist()))
    return found


def dataset_of(prefix: str, batching: Batching, vocab_size: int = VOCABULARY) -> InstructionDataset:
    pair = ConversationPair(prefix)
    return InstructionDataset([pair], Order([InOrder(np.arange(len(pair)))]), batching, vocab_size=vocab_size)


def weights_of(conversation: Conversation, batching: Batching) -> list[float]:
    """The weight of each label, by Megatron-LLM's rules: of some, all; of the assistant's 1; of padding 0."""
    tokens, roles = (part[: batching.sequence_length + 1] for part in conversation)
    found = []
    for token, role in zip(tokens[1:], roles[1:], strict=True):
        weight = 1.0 if role == 2 else batching.prompt_loss_weight
        found.append(0.0 if token == batching.pad_token_id else float(np.float32(weight)))
    return found


def check_row(micro: MicroBatch, row: int, columns: slice, conversation: Conversation, batching: Batching) -> None:
    tokens, weights = list(conversation[0])[: batching.sequence_length + 1], weights_of(conversation, batching)
    assert micro.tokens[row, columns].tolist() == tokens[:-1]
    assert micro.loss_weights is not None and micro.loss_weights[row, columns].tolist() == weights
    expected = [token if weight else IGNORED for token, weight in zip(tokens[1:], weights, strict=True)]
    assert micro.labels[row, columns].tolist() == expected


@pytest.mark.parametrize("prompt_loss_weight", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("pad_token_id", [None, 3])
def test_padded_rows(
    make_conversations: MakeConversations, prompt_loss_weight: float, pad_token_id: int | None
) -> None:
    conversations = random_conversations(40, 60)
    batching = Batching(48, False, prompt_loss_weight, pad_token_id, length_unit=8)
    dataset = dataset_of(make_conversations(conversations), batching)
    assert len(dataset) == 40
    lengths = set()
    for start in range(0, 40, 4):
        micro = dataset.micro_batches(np.arange(start, start + 4)[None])[0]
        inputs = [min(max(len(tokens) - 1, 0), 48) for tokens, _ in conversations[start : start + 4]]
        length = min(48, -(-max(*inputs, 1) // 16) * 16)
        assert micro.tokens.shape == micro.labels.shape == (4, length) and micro.documents is None
        for row, count in enumerate(inputs):
            check_row(micro, row, slice(count), conversations[start + row], batching)
            assert not micro.tokens[row, count:].any() and (micro.labels[row, count:] == IGNORED).all()
            assert micro.loss_weights is not None and not micro.loss_weights[row, count:].any()
        lengths.add(length)
    assert lengths == {32, 48}


def test_lengths_are_what_the_grid_needs(make_conversations: MakeConversations) -> None:
    prefix = make_conversations([(list(range(12)), [2] * 12), (list(range(40)), [2] * 40)])
    for unit, expected in ((1, [16, 48]), (12, [48, 48]), (32, [32, 60])):
        dataset = dataset_of(prefix, Batching(60, False, length_unit=unit))
        assert dataset.lengths(np.array([[0], [1]])).tolist() == expected
        assert [dataset.micro_batches(np.array([[index]]))[0].tokens.shape[1] for index in range(2)] == expected


def test_packed_rows(make_conversations: MakeConversations) -> None:
    conversations = random_conversations(200, 60)
    batching = Batching(48, True, 0.25)
    dataset = dataset_of(make_conversations(conversations), batching)
    seen: list[int] = []
    for index in range(len(dataset)):
        micro, column = dataset.micro_batches(np.array([[index]]))[0], 0
        assert micro.tokens.shape == (1, 48) and micro.documents is not None
        starts = micro.documents.starts[0].tolist()
        for number in dataset.conversations(index):
            count = min(len(conversations[number][0]) - 1, 48)
            check_row(micro, 0, slice(column, column + count), conversations[number], batching)
            assert starts[column : column + count] == [column] * count
            seen.append(number)
            column += count
        assert starts[column:] == [column] * (48 - column) and (micro.labels[0, column:] == IGNORED).all()
        assert micro.documents.most >= len(set(starts))
    assert sorted(seen) == [number for number, (tokens, _) in enumerate(conversations) if len(tokens) > 1]


def alone(text: str) -> list[str]:
    return [text]


@pytest.mark.parametrize("prompt_loss_weight", [0.0, 0.3])
def test_packed_and_padded_have_the_same_loss(make_conversations: MakeConversations, prompt_loss_weight: float) -> None:
    """In float64, over all conversations, and both what each of them gives alone in a row as long as itself."""
    conversations = random_conversations(60, 40)
    prefix = make_conversations(conversations)
    model = Transformer(MODEL, single_rank(), torch.float64)
    initialize(model, MODEL, 7)
    total = weight_sum = 0.0
    for conversation in conversations:
        tokens, weights = (
            torch.tensor(conversation[0]),
            weights_of(conversation, Batching(64, False, prompt_loss_weight)),
        )
        if len(tokens) > 1:
            with torch.no_grad():
                log_probabilities = model(tokens[None, :-1])[:, 0, :VOCABULARY].log_softmax(-1)
            losses = -log_probabilities.gather(1, tokens[1:, None])[:, 0]
            total += (losses * torch.tensor(weights, dtype=torch.float64)).sum().item()
            weight_sum += sum(weights)
    for packing in (True, False):
        dataset = dataset_of(prefix, Batching(64, packing, prompt_loss_weight))
        for micro_batch in (1, 3):
            found = evaluate(model, dataset, alone, micro_batch=micro_batch, micro_batches=2)
            assert found.loss == pytest.approx(total / weight_sum, rel=1e-13)
            assert found.tokens == round(weight_sum)


@pytest.mark.parametrize("packing", [False, True])
def test_a_global_batch_does_not_depend_on_the_grid_and_resumes_from_its_position(
    make_conversations: MakeConversations, packing: bool
) -> None:
    prefix = make_conversations(random_conversations(70, 40))

    def rows(micro_batch: int, size: int, steps: int, position: int = 0) -> list[set[tuple[int, ...]]]:
        """Of each step what all ranks read, row by row without padding."""
        found: list[set[tuple[int, ...]]] = [set() for _ in range(steps)]
        for rank in range(size):
            pair = ConversationPair(prefix)
            dataset = InstructionDataset(
                [pair], Order([StableEpochs(np.arange(len(pair)), 5)]), Batching(32, packing, 1.0),
                vocab_size=VOCABULARY, seed=5,
            )  # fmt: skip
            with BatchLoader(
                dataset, global_batch=8, micro_batch=micro_batch, rank=rank, size=size, vocab_size=VOCABULARY,
                position=position,
            ) as loader:  # fmt: skip
                for step in found:
                    for micro in loader.next_batch():
                        step.update(tuple(row[row != IGNORED].tolist()) for row in micro.labels)
        return found

    whole = rows(8, 1, 12)
    assert rows(2, 2, 12) == rows(1, 4, 12) == whole
    assert rows(4, 1, 5, position=7 * 8) == whole[7:]


def test_a_token_outside_the_vocabulary_is_named(make_conversations: MakeConversations) -> None:
    prefix = make_conversations([([1, 2], [1, 2]), ([3, 49, 5], [1, 2, 2])])
    dataset = dataset_of(prefix, Batching(8, False), vocab_size=49)
    with pytest.raises(DataError, match=r"orca-text.bin \(sequence 1\) holds the token 49.*vocabulary of 49"):
        dataset.micro_batches(np.array([[0, 1]]))
    assert "sequence 1" in dataset.source(1)


def test_a_role_that_is_none_is_named(make_conversations: MakeConversations) -> None:
    prefix = make_conversations([([1, 2], [1, 2]), ([3, 4, 5], [1, 7, 2])])
    with pytest.raises(DataError, match=r"orca-role.bin, sequence 1, token 1 has the role 7; roles are 0 \(system\)"):
        dataset_of(prefix, Batching(8, True)).micro_batches(np.array([[0]]))


@pytest.mark.parametrize("conversations", [[], [([], [])], [([4], [2])]])
@pytest.mark.parametrize("packing", [False, True])
def test_data_without_a_prediction_are_refused(
    make_conversations: MakeConversations, conversations: Sequence[Conversation], packing: bool
) -> None:
    with pytest.raises(DataError, match="no conversation of two tokens or more"):
        dataset_of(make_conversations(conversations), Batching(8, packing))
