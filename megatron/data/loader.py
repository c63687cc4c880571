"""From samples to the micro-batches of one data-parallel rank, a step ahead of the trainer.

A global batch is always the next samples of the order, as many as the ramp says at that position, whatever the
micro-batch and the number of data ranks, so the position in the order is all there is to save. `rank` and `size` are
integers: this module knows no process groups and no devices.
"""

from __future__ import annotations

import queue
import sys
import threading
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from megatron.config.batches import Ramp
from megatron.data.dataset import PADDING, Dataset, RowDataset
from megatron.kernels.runs import Documents
from megatron.model.loss import IGNORED
from megatron.utils.errors import ConfigError, DataError

_AHEAD = 2  # steps that are read ahead
_POLL_S = 0.1


@dataclass(frozen=True)
class MicroBatch:
    """What a forward pass reads: `tokens` i64[b, s], all valid ids; `labels` i64[b, s], some `IGNORED`; the `documents`
    that the samples are packed of, where attention is to stay within them; `loss_weights` f32[b, s] of the labels,
    where they do not count alike."""

    tokens: torch.Tensor
    labels: torch.Tensor
    documents: Documents | None = None
    loss_weights: torch.Tensor | None = None


@runtime_checkable
class MicroBatchDataset(Protocol):
    """A dataset that makes micro-batches itself, of lengths that may differ."""

    def __len__(self) -> int:
        """Rows; `ENDLESS` where there is no limit."""
        ...

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """How long the micro-batches of the rows [n, b] are: [n]."""
        ...

    def micro_batches(self, indices: NDArray[np.int64]) -> list[MicroBatch]:
        """The micro-batches of the rows [n, b], of which those past the end carry no loss."""
        ...

    def source(self, index: int) -> str:
        """Where a row comes from, in words for an error message."""
        ...


def indices_of_rank(position: int, global_batch: int, micro_batch: int, rank: int, size: int) -> NDArray[np.int64]:
    """Which samples data rank `rank` of `size` reads in the step that begins at `position`: [micro-batches, b].

    In Megatron's order: micro-step t takes the samples from position + t·micro_batch·size on, rank r the r-th run of
    `micro_batch` of them.
    """
    firsts = np.arange(position + rank * micro_batch, position + global_batch, micro_batch * size)
    return firsts[:, None] + np.arange(micro_batch)


class BufferPool:
    """Memory for what is handed out, used again once nobody holds it: fresh memory costs more than filling it.

    Whoever holds a view of a buffer, or a tensor that shares its memory, refers to the buffer: so Python's own count
    tells when it is free.
    """

    _MOST = 8

    def __init__(self) -> None:
        self._buffers: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
        self._free = self._references(0)
        self._buffers.clear()

    def take(self, shape: tuple[int, ...]) -> NDArray[np.int64]:
        """An array that nobody else holds, of any content."""
        for at in range(len(self._buffers)):
            if self._buffers[at].shape == shape and self._references(at) == self._free:
                return self._buffers[at][...]
        if len(self._buffers) == self._MOST:
            del self._buffers[0]  # of another size, or kept by somebody
        self._buffers.append(np.empty(shape, dtype=np.int64))
        return self._buffers[-1][...]

    def _references(self, at: int) -> int:
        return sys.getrefcount(self._buffers[at])


class BatchLoader:
    """The micro-batches of data rank `rank` of `size`, step by step from sample `position` of the order on.

    `global_batch` is a number of sequences or a ramp of it. A thread reads ahead; its errors are raised by
    `next_batch`. With `pad_last`, a last global batch that the dataset cannot fill is filled with samples that carry no
    loss. With `document_mask`, micro-batches know their documents. The system is told of the samples of `readahead`
    further steps. Raises ConfigError if a global batch does not divide.
    """

    def __init__(
        self,
        dataset: Dataset | MicroBatchDataset,
        *,
        global_batch: int | Ramp,
        micro_batch: int,
        rank: int,
        size: int,
        vocab_size: int,
        position: int = 0,
        pad_last: bool = False,
        document_mask: bool = False,
        readahead: int = 0,
    ) -> None:
        assert 0 <= rank < size and position >= 0, (rank, size, position)
        self._ramp = global_batch if isinstance(global_batch, Ramp) else Ramp(((0, global_batch),))
        for _, batch in self._ramp.stages:
            _check_divides(batch, micro_batch, size)
        self._dataset = dataset
        self._in_rows = dataset if isinstance(dataset, RowDataset) else None
        self._in_batches = dataset if isinstance(dataset, MicroBatchDataset) else None
        self._micro_batch = micro_batch
        self._rank = rank
        self._size = size
        self._vocab_size = vocab_size
        self._pad_last = pad_last
        self._document_mask = document_mask
        self._readahead = readahead
        self._announced = position  # the system has been told of the samples before it
        self._pool = BufferPool()
        self._position = position
        self._ready: queue.Queue[tuple[list[MicroBatch], int] | BaseException] = queue.Queue(maxsize=_AHEAD)
        self.step_tokens = 0  # of the batch that was returned last: all ranks' input tokens, padding included
        self._failure: BaseException | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(position,), name="batch loader", daemon=True)
        self._thread.start()

    @property
    def dataset(self) -> Dataset | MicroBatchDataset:
        """What is read."""
        return self._dataset

    @property
    def position(self) -> int:
        """The first sample of the order that no returned batch has covered: what a checkpoint keeps."""
        return self._position

    def next_batch(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next global step.

        Raises DataError if the dataset has no sample left for it or holds a token outside the vocabulary, and whatever
        else went wrong in the reading thread.
        """
        assert not self._closing.is_set(), "the loader is closed"
        if self._failure is None:
            item = self._ready.get()
            if not isinstance(item, BaseException):
                self._position += self._ramp.batch_at(self._position)
                batch, self.step_tokens = item
                return batch
            self._failure = item  # the thread has ended: asked again, say the same again
        raise self._failure

    def close(self) -> None:
        """Stop reading ahead. Safe to call twice."""
        self._closing.set()
        self._thread.join()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_ahead(self, position: int) -> None:
        item: tuple[list[MicroBatch], int] | BaseException
        while not self._closing.is_set():
            try:
                self._announce(position)
                item = self._read_step(position)
            except BaseException as error:  # handed to the trainer's thread, which raises it
                item = error
            position += self._ramp.batch_at(position)
            self._hand_over(item)
            if isinstance(item, BaseException):
                return

    def _hand_over(self, item: tuple[list[MicroBatch], int] | BaseException) -> None:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return

    def _announce(self, position: int) -> None:
        """See to it that the system knows of the step at `position` and of `readahead` steps behind it."""
        if not self._readahead or self._in_rows is None:
            return
        until = self._ramp.position_after(1 + self._readahead, position)
        while self._announced < until and not self._closing.is_set():
            indices = self._indices(self._announced).reshape(-1)
            there = indices[indices < len(self._dataset)]
            if len(there):  # steps behind the end of the data are asked for too, and told of only when they come
                self._in_rows.announce(there)
            self._announced += self._ramp.batch_at(self._announced)

    def _indices(self, position: int) -> NDArray[np.int64]:
        batch = self._ramp.batch_at(position)
        return indices_of_rank(position, batch, self._micro_batch, self._rank, self._size)

    def _read_step(self, position: int) -> tuple[list[MicroBatch], int]:
        """This rank's micro-batches of a step, and the input tokens of all ranks in it."""
        available = len(self._dataset)
        last = position + self._ramp.batch_at(position)
        if position >= available or (last > available and not self._pad_last):
            raise DataError(
                f"the data end after sample {available:,}, but the next step reads samples {position:,} to {last:,}; "
                "raise data.samples (which makes another order) or stop earlier with train.steps"
            )
        indices = self._indices(position)
        if self._in_batches is not None:
            lengths = self._in_batches.lengths(np.arange(position, last).reshape(-1, self._micro_batch))
            return self._in_batches.micro_batches(indices), int(lengths.sum()) * self._micro_batch
        batch = self._read_samples(indices) if self._in_rows is None else self._read_rows(indices, self._in_rows)
        return batch, (last - position) * batch[0].tokens.shape[1]

    def _read_rows(self, indices: NDArray[np.int64], dataset: RowDataset) -> list[MicroBatch]:
        """Micro-batches [n, b], all of their rows at once."""
        flat = indices.reshape(-1)
        present = np.flatnonzero(flat < len(dataset))
        tokens, labels = self._pool.take((2, len(flat), dataset.sequence_length))
        if len(present) < len(flat):
            tokens.fill(PADDING)
            labels.fill(PADDING)
        low, high = dataset.fill(flat[present], tokens, labels, present)
        self._check_range(low, high, tokens, labels, flat, dataset)
        if low < 0 or len(present) < len(flat):
            _hide_padding(tokens, labels)
        shape = (*indices.shape, dataset.sequence_length)
        rows = zip(torch.from_numpy(tokens).view(shape), torch.from_numpy(labels).view(shape), indices, strict=True)
        return [MicroBatch(one, other, self._documents(samples, one.shape[1], dataset)) for one, other, samples in rows]

    def _read_samples(self, indices: NDArray[np.int64]) -> list[MicroBatch]:
        """The same of a dataset that gives one sample at a time."""
        assert not isinstance(self._dataset, MicroBatchDataset)
        dataset, found = self._dataset, []
        for micro_batch in indices:
            samples = [dataset.sample(index) for index in micro_batch.tolist() if index < len(dataset)]
            # Where there is nothing but padding, its width is that of any sample.
            empty = np.full_like(samples[0] if samples else dataset.sample(0), PADDING)
            rows = np.stack([*samples, *[empty] * (len(micro_batch) - len(samples))])
            tokens, labels = rows[:, :-1].copy(), rows[:, 1:].copy()
            self._check_range(int(rows.min()), int(rows.max()), tokens, labels, micro_batch, dataset)
            _hide_padding(tokens, labels)
            documents = self._documents(micro_batch, tokens.shape[1], dataset)
            found.append(MicroBatch(torch.from_numpy(tokens), torch.from_numpy(labels), documents))
        return found

    def _documents(self, indices: NDArray[np.int64], sequence_length: int, dataset: Dataset) -> Documents | None:
        return _documents(indices, sequence_length, dataset) if self._document_mask else None

    def _check_range(
        self,
        low: int,
        high: int,
        tokens: NDArray[np.int64],
        labels: NDArray[np.int64],
        indices: NDArray[np.int64],
        dataset: Dataset,
    ) -> None:
        """Raise DataError where the lowest or the highest value of rows is no token."""
        if low >= PADDING and high < self._vocab_size:
            return
        rows = np.concatenate((tokens, labels[:, -1:]), axis=1)
        row, column = np.argwhere((rows >= self._vocab_size) | (rows < PADDING))[0].tolist()
        index = int(indices[row])
        raise DataError(
            f"sample {index} holds the token {rows[row, column]}, which is not among the model's vocabulary of "
            f"{self._vocab_size} (0 … {self._vocab_size - 1}); it comes from {dataset.source(index)}. "
            "Use data made with this model's tokenizer"
        )


def _hide_padding(tokens: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
    """Where there is no token, let there be a valid one that is not predicted."""
    tokens[tokens == PADDING] = 0
    labels[labels == PADDING] = IGNORED


def _documents(indices: NDArray[np.int64], sequence_length: int, dataset: Dataset) -> Documents:
    """The documents of these samples, of which those past the end of the data have none."""
    starts, most = np.zeros((len(indices), sequence_length), dtype=np.int32), 1
    present = indices[indices < len(dataset)]
    if isinstance(dataset, RowDataset):
        boundaries = dataset.boundaries_of(present)
    else:
        boundaries = [dataset.boundaries(index) for index in present.tolist()]
    for row, found in zip(starts, boundaries, strict=False):  # what is past the end of the data comes last
        begins = [begin for begin in found.tolist() if begin < sequence_length]  # the last token is a label alone
        for begin, end in pairwise([*begins, sequence_length]):
            row[begin:end] = begin
        most = max(most, 1 + len(begins))
    return Documents(torch.from_numpy(starts), most)


def _check_divides(global_batch: int, micro_batch: int, size: int) -> None:
    if global_batch % (micro_batch * size) != 0:
        raise ConfigError(
            f"train.global_batch={global_batch} is not a multiple of train.micro_batch={micro_batch} x "
            f"{size} data-parallel ranks = {micro_batch * size}; "
            f"use {max(1, round(global_batch / (micro_batch * size))) * micro_batch * size}"
        )
