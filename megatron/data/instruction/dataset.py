"""Micro-batches of conversations: a row for each, or rows packed of several that do not see each other.

The loss is on the assistant's tokens, and as far as is wished on the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron.data.dataset import ENDLESS
from megatron.data.explain import line_of
from megatron.data.instruction.order import Order
from megatron.data.instruction.packing import Packing, window_for
from megatron.data.instruction.pair import ConversationPair, Role, text_prefix
from megatron.data.loader import MicroBatch
from megatron.data.provenance import read_provenance
from megatron.kernels.runs import Documents
from megatron.model.loss import IGNORED
from megatron.utils.errors import DataError

_LENGTH_UNIT = 16  # of which the lengths of padded rows are multiples, as Megatron-LLM's are


@dataclass(frozen=True)
class Batching:
    """How conversations become rows and losses.

    A row has up to `sequence_length` input tokens; what a conversation has beyond is cut off. `packing` puts several
    into a row; without, a micro-batch is padded to its longest, rounded up to 16 and to `length_unit`, of which the
    grid needs a multiple. `prompt_loss_weight` is the weight of labels that are not the assistant's; labels
    `pad_token_id` have none.
    """

    sequence_length: int
    packing: bool
    prompt_loss_weight: float = 0.0
    pad_token_id: int | None = None
    length_unit: int = 1


class InstructionDataset:
    """Rows of conversations in an order, at most `most`; which member of `pairs` a conversation is of, the order says.

    Raises DataError where no conversation has anything to predict.
    """

    def __init__(
        self,
        pairs: Sequence[ConversationPair],
        order: Order,
        batching: Batching,
        *,
        vocab_size: int,
        seed: int = 0,
        most: int = ENDLESS,
    ) -> None:
        self._pairs, self._order, self._batching, self._vocab_size = list(pairs), order, batching, vocab_size
        self._packing: Packing | None = None
        for pair in self._pairs:
            if not len(pair) or pair.sizes.max() < 2:
                raise DataError(f"{pair.prefix} has no conversation of two tokens or more; use other data")
        if batching.packing:
            inputs = [np.minimum(pair.sizes - 1, batching.sequence_length) for pair in self._pairs]
            mean = sum(int(one.sum(dtype=np.int64)) for one in inputs) / sum(len(one) for one in inputs)
            window = window_for(batching.sequence_length, max(mean, 1.0))
            self._packing = Packing(
                self._inputs, len(order), capacity=batching.sequence_length, window=window, seed=seed
            )
        if len(order) == ENDLESS:
            self._rows = most
        else:
            self._rows = min(len(order), most) if self._packing is None else self._packing.count(most)

    def __len__(self) -> int:
        """Rows; `ENDLESS` where there is no limit."""
        return self._rows

    def conversations(self, index: int) -> list[int]:
        """The positions in the order of the conversations of a row."""
        return [index] if self._packing is None else self._packing.row(index)

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """How long the rows of micro-batches [n, b] are: [n]. Without packing it differs."""
        batching = self._batching
        if self._packing is not None:
            return np.full(len(indices), batching.sequence_length)
        present = indices < self._rows
        inputs = np.where(present, self._inputs(np.where(present, indices, 0).reshape(-1)).reshape(indices.shape), 0)
        unit = math.lcm(_LENGTH_UNIT, batching.length_unit)
        return np.minimum(-(-np.maximum(inputs.max(axis=1), 1) // unit) * unit, batching.sequence_length)

    def micro_batch(self, indices: NDArray[np.int64]) -> MicroBatch:
        """The rows `indices` [b], of which those past the end carry no loss.

        Raises DataError for tokens outside the vocabulary and for roles that are none.
        """
        shape = (len(indices), int(self.lengths(indices[None])[0]))
        tokens, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
        weights, starts = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.int32)
        most = 1
        rows = [self.conversations(index) if index < self._rows else [] for index in indices.tolist()]
        members, sequences = self._order.locate(
            np.array([position for row in rows for position in row], dtype=np.int64)
        )
        located = zip(members.tolist(), sequences.tolist(), strict=True)
        for row, conversations in enumerate(rows):
            column = 0
            for member, sequence in itertools.islice(located, len(conversations)):
                read, roles = self._read(self._pairs[member], sequence)
                part = slice(column, column + len(read) - 1)
                tokens[row, part], labels[row, part] = read[:-1], read[1:]
                weights[row, part] = self._weights(read[1:], roles[1:])
                starts[row, part] = column
                column = part.stop
            starts[row, column:] = column  # padding keeps to itself
            most = max(most, len(conversations) + 1)
        labels[weights == 0] = IGNORED
        documents = None if self._packing is None else Documents(torch.from_numpy(starts), most)
        return MicroBatch(torch.from_numpy(tokens), torch.from_numpy(labels), documents, torch.from_numpy(weights))

    def source(self, index: int) -> str:
        """Where a row comes from, in words for an error message."""
        members, sequences = self._order.locate(np.array(self.conversations(index), dtype=np.int64))
        return "; ".join(
            _source(self._pairs[member], sequence)
            for member, sequence in zip(members.tolist(), sequences.tolist(), strict=True)
        )

    def _inputs(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many input tokens the conversations at these positions have."""
        members, sequences = self._order.locate(positions)
        sizes = np.empty_like(positions)
        for member in np.unique(members).tolist():
            here = members == member
            sizes[here] = self._pairs[member].sizes[sequences[here]]
        return np.clip(sizes - 1, 0, self._batching.sequence_length)

    def _read(self, pair: ConversationPair, sequence: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens and roles of a conversation: inputs and one more."""
        tokens, roles = pair.read(sequence, self._batching.sequence_length + 1)
        if len(tokens) and tokens.max() >= self._vocab_size:
            raise DataError(
                f"{pair.source(sequence)} holds the token {tokens.max()}, which is not among the model's vocabulary of "
                f"{self._vocab_size} (0 … {self._vocab_size - 1}); use data made with this model's tokenizer"
            )
        return (tokens, roles) if len(tokens) else (np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))

    def _weights(self, labels: NDArray[np.int64], roles: NDArray[np.int64]) -> NDArray[np.float32]:
        weights = np.where(roles == Role.ASSISTANT, np.float32(1.0), np.float32(self._batching.prompt_loss_weight))
        if self._batching.pad_token_id is not None:
            weights[labels == self._batching.pad_token_id] = 0.0
        return weights


def _source(pair: ConversationPair, sequence: int) -> str:
    """Where a conversation is, and the line that it was made of, where the .json beside it says so."""
    line = line_of(read_provenance(text_prefix(pair.prefix)), sequence)
    return pair.source(sequence) + (f", made of {line[0]}, line {line[1]}" if line is not None else "")
