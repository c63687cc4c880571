"""Micro-batches of conversations: a row for each, or rows packed of several that do not see each other.

The loss is on the assistant's tokens, and as far as is wished on the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron.data.dataset import ENDLESS
from megatron.data.explain import line_of
from megatron.data.instruction.order import Order
from megatron.data.instruction.packing import Packing, window_for
from megatron.data.instruction.pair import ConversationPair, Filled, Role, text_prefix
from megatron.data.loader import MicroBatch
from megatron.data.provenance import read_provenance
from megatron.kernels.runs import Documents
from megatron.model.loss import IGNORED
from megatron.utils.errors import DataError

_NO_ROLE = max(Role) + 1  # of padding
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

    def micro_batches(self, indices: NDArray[np.int64]) -> list[MicroBatch]:
        """The micro-batches of the rows [n, b], of which those past the end carry no loss.

        Raises DataError for tokens outside the vocabulary and for roles that are none.
        """
        widths = self.lengths(indices)
        bounds = np.append(0, np.cumsum(widths * indices.shape[1]))  # of each micro-batch among all tokens
        placed = self._place(indices, widths)
        filled = self._fill(placed, int(bounds[-1]))
        weights = self._weights(filled)
        np.putmask(filled.labels, weights == 0, IGNORED)
        starts = None if self._packing is None else placed.starts()
        found = []
        for begin, end, most in zip(bounds[:-1].tolist(), bounds[1:].tolist(), placed.most.tolist(), strict=True):

            def rows(flat: NDArray[Any], part: slice = slice(begin, end)) -> torch.Tensor:
                return torch.from_numpy(flat[part].reshape(indices.shape[1], -1))

            documents = None if starts is None else Documents(rows(starts), most)
            found.append(MicroBatch(rows(filled.tokens), rows(filled.labels), documents, rows(weights)))
        return found

    def _place(self, indices: NDArray[np.int64], widths: NDArray[np.int64]) -> _Placed:
        """Where the conversations of micro-batches of rows [n, b], `widths` [n] long, lie in them."""
        rows = [self.conversations(index) if index < self._rows else [] for index in indices.reshape(-1).tolist()]
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        positions = np.fromiter(itertools.chain.from_iterable(rows), np.int64, counts.sum())
        members, sequences = self._order.locate(positions)
        inputs = self._inputs_of(members, sequences)
        before = np.append(0, np.cumsum(inputs))
        row_ends = np.cumsum(counts)
        row_widths = np.repeat(widths, indices.shape[1])
        row_begins = np.cumsum(row_widths) - row_widths
        columns = before[:-1] - np.repeat(before[row_ends - counts], counts)
        begins = columns + np.repeat(row_begins, counts)
        padding = row_widths - (before[row_ends] - before[row_ends - counts])
        most = 1 + counts.reshape(indices.shape).max(axis=1)
        return _Placed(members, sequences, inputs, columns, begins, row_ends, padding, row_widths, most)

    def _fill(self, placed: _Placed, size: int) -> Filled:
        """The tokens, labels and roles of conversations, and where there are none 0, 0 and `_NO_ROLE`."""
        tokens, labels = np.zeros((2, size), dtype=np.int64)
        out = Filled(tokens, labels, np.full(size, _NO_ROLE, dtype=np.int64))
        for member in np.unique(placed.members).tolist():
            here = placed.members == member
            sequences = placed.sequences[here]
            low, high, lowest_role, highest_role = self._pairs[member].fill(
                sequences, placed.inputs[here], placed.begins[here], out
            )
            if low < 0 or high >= self._vocab_size or lowest_role < 0 or highest_role > max(Role):
                for sequence in sequences.tolist():  # one of them is to be named
                    self._check(self._pairs[member], sequence)
        return out

    def source(self, index: int) -> str:
        """Where a row comes from, in words for an error message."""
        members, sequences = self._order.locate(np.array(self.conversations(index), dtype=np.int64))
        return "; ".join(
            _source(self._pairs[member], sequence)
            for member, sequence in zip(members.tolist(), sequences.tolist(), strict=True)
        )

    def _inputs(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many input tokens the conversations at these positions have."""
        return self._inputs_of(*self._order.locate(positions))

    def _inputs_of(self, members: NDArray[np.int64], sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        sizes = np.empty_like(sequences)
        for member in np.unique(members).tolist():
            here = members == member
            sizes[here] = self._pairs[member].sizes[sequences[here]]
        return np.clip(sizes - 1, 0, self._batching.sequence_length)

    def _check(self, pair: ConversationPair, sequence: int) -> None:
        tokens, _ = pair.read(sequence, self._batching.sequence_length + 1)
        if len(tokens) and tokens.max() >= self._vocab_size:
            raise DataError(
                f"{pair.source(sequence)} holds the token {tokens.max()}, which is not among the model's vocabulary of "
                f"{self._vocab_size} (0 … {self._vocab_size - 1}); use data made with this model's tokenizer"
            )

    def _weights(self, filled: Filled) -> NDArray[np.float32]:
        of_roles = np.full(_NO_ROLE + 1, self._batching.prompt_loss_weight, dtype=np.float32)
        of_roles[Role.ASSISTANT], of_roles[_NO_ROLE] = 1.0, 0.0
        weights: NDArray[np.float32] = of_roles.take(filled.roles)
        if self._batching.pad_token_id is not None:
            weights[filled.labels == self._batching.pad_token_id] = 0.0
        return weights


@dataclass(frozen=True)
class _Placed:
    """Conversations in micro-batches: of each the member and which of its pair's, the number of its inputs, at which
    column of its row it begins and where among the tokens of all micro-batches; of each row how many conversations come
    before its end, how many tokens of padding it has, and its width; of each micro-batch `most`, the most parts that a
    row of it has."""

    members: NDArray[np.int64]
    sequences: NDArray[np.int64]
    inputs: NDArray[np.int64]
    columns: NDArray[np.int64]
    begins: NDArray[np.int64]
    row_ends: NDArray[np.int64]
    padding: NDArray[np.int64]
    row_widths: NDArray[np.int64]
    most: NDArray[np.int64]

    def starts(self) -> NDArray[np.int32]:
        """Of each token the column where its conversation begins. Padding keeps to itself."""
        columns = np.insert(self.columns, self.row_ends, self.row_widths - self.padding)
        return np.repeat(columns.astype(np.int32), np.insert(self.inputs, self.row_ends, self.padding))


def _source(pair: ConversationPair, sequence: int) -> str:
    """Where a conversation is, and the line that it was made of, where the .json beside it says so."""
    line = line_of(read_provenance(text_prefix(pair.prefix)), sequence)
    return pair.source(sequence) + (f", made of {line[0]}, line {line[1]}" if line is not None else "")
