"""From samples to the micro-batches of one data-parallel rank, a step ahead of the trainer.

A global batch is always the next samples of the order, as many as the ramp says at that position, whatever the
micro-batch and the number of data ranks, so the position in the order is all there is to save. `rank` and `size` are
integers: this module knows no process groups and no devices.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

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
_CHUNK_TOKENS = 1 << 16  # what is read at a time: it stays in the processor's cache until it is looked over and copied


@dataclass(frozen=True)
class MicroBatch:
    """What a forward pass reads: `tokens` i64[b, s], all valid ids; `labels` i64[b, s], some `IGNORED`; the `documents`
    that the samples are packed of, where attention is to stay within them; `loss_weights` f32[b, s] of the labels,
    where they do not count alike."""

    tokens: torch.Tensor
    labels: torch.Tensor
    documents: Documents | None = None
    loss_weights: torch.Tensor | None = None


def indices_of_rank(position: int, global_batch: int, micro_batch: int, rank: int, size: int) -> NDArray[np.int64]:
    """Which samples data rank `rank` of `size` reads in the step that begins at `position`: [micro-batches, b].

    In Megatron's order: micro-step t takes the samples from position + t·micro_batch·size on, rank r the r-th run of
    `micro_batch` of them.
    """
    firsts = np.arange(position + rank * micro_batch, position + global_batch, micro_batch * size)
    return firsts[:, None] + np.arange(micro_batch)


class BatchLoader:
    """The micro-batches of data rank `rank` of `size`, step by step from sample `position` of the order on.

    `global_batch` is a number of sequences or a ramp of it. A thread reads ahead; its errors are raised by
    `next_batch`. With `pad_last`, a last global batch that the dataset cannot fill is filled with samples that carry no
    loss. With `document_mask`, micro-batches know their documents. The system is told of the samples of `readahead`
    further steps. Raises ConfigError if a global batch does not divide.
    """

    def __init__(
        self,
        dataset: Dataset,
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
        self._micro_batch = micro_batch
        self._rank = rank
        self._size = size
        self._vocab_size = vocab_size
        self._pad_last = pad_last
        self._document_mask = document_mask
        self._readahead = readahead
        self._announced = position  # the system has been told of the samples before it
        self._buffer: NDArray[np.int64] | None = None
        self._position = position
        self._ready: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(maxsize=_AHEAD)
        self._failure: BaseException | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(position,), name="batch loader", daemon=True)
        self._thread.start()

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
            batch = self._ready.get()
            if not isinstance(batch, BaseException):
                self._position += self._ramp.batch_at(self._position)
                return batch
            self._failure = batch  # the thread has ended: asked again, say the same again
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
        item: list[MicroBatch] | BaseException
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

    def _hand_over(self, item: list[MicroBatch] | BaseException) -> None:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return

    def _announce(self, position: int) -> None:
        """See to it that the system knows of the step at `position` and of `readahead` steps behind it."""
        if not (self._readahead and isinstance(self._dataset, RowDataset)):
            return
        until = self._ramp.position_after(1 + self._readahead, position)
        while self._announced < until and not self._closing.is_set():
            indices = self._indices(self._announced).reshape(-1)
            self._dataset.announce(indices[indices < len(self._dataset)])
            self._announced += self._ramp.batch_at(self._announced)

    def _indices(self, position: int) -> NDArray[np.int64]:
        batch = self._ramp.batch_at(position)
        return indices_of_rank(position, batch, self._micro_batch, self._rank, self._size)

    def _read_step(self, position: int) -> list[MicroBatch]:
        available = len(self._dataset)
        last = position + self._ramp.batch_at(position)
        if position >= available or (last > available and not self._pad_last):
            raise DataError(
                f"the data end after sample {available:,}, but the next step reads samples {position:,} to {last:,}; "
                "raise data.samples (which makes another order) or stop earlier with train.steps"
            )
        return [micro_batch for chunk in self._chunks(position) for micro_batch in self._read_chunk(chunk)]

    def _chunks(self, position: int) -> Iterator[NDArray[np.int64]]:
        """The samples of a step, [micro-batches, b] that are read together."""
        indices, together = self._indices(position), 1
        if isinstance(self._dataset, RowDataset):
            together = max(1, _CHUNK_TOKENS // (self._micro_batch * (self._dataset.sequence_length + 1)))
        for start in range(0, len(indices), together):
            yield indices[start : start + together]

    def _read_chunk(self, indices: NDArray[np.int64]) -> list[MicroBatch]:
        count, width = indices.shape
        rows = self._rows(indices.reshape(-1))
        tokens, labels = np.empty((2, *rows[:, 1:].shape), dtype=np.int64)
        np.copyto(tokens, rows[:, :-1])
        np.copyto(labels, rows[:, 1:])
        if rows.min() < 0:
            tokens[tokens == PADDING] = 0
            labels[labels == PADDING] = IGNORED
        shape = (count, width, tokens.shape[1])
        return [
            MicroBatch(torch.from_numpy(one), torch.from_numpy(other), self._documents(samples, tokens.shape[1]))
            for one, other, samples in zip(tokens.reshape(shape), labels.reshape(shape), indices, strict=True)
        ]

    def _rows(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples, as far as there are so many, tokens of the vocabulary or `PADDING`: [n, sequence_length + 1].

        Valid until the next call.
        """
        available = len(self._dataset)
        present = np.flatnonzero(indices < available)
        if isinstance(self._dataset, RowDataset):
            shape = (len(indices), self._dataset.sequence_length + 1)
            if self._buffer is None or self._buffer.size < shape[0] * shape[1]:
                self._buffer = np.empty(shape[0] * shape[1], dtype=np.int64)
            rows = self._buffer[: shape[0] * shape[1]].reshape(shape)
            if len(present) < len(indices):
                rows.fill(PADDING)
            self._dataset.fill(indices[present], rows, present)
        else:
            samples = [self._dataset.sample(index) for index in indices[present].tolist()]
            # Where there is nothing but padding, its width is that of any sample.
            empty = np.full_like(samples[0] if samples else self._dataset.sample(0), PADDING)
            rows = np.stack([*samples, *[empty] * (len(indices) - len(present))])
        if rows.size and (rows.max() >= self._vocab_size or rows.min() < PADDING):
            raise self._out_of_range(rows, indices)
        return rows

    def _documents(self, indices: NDArray[np.int64], sequence_length: int) -> Documents | None:
        """The documents of these samples, of which those past the end of the data have none."""
        if not self._document_mask:
            return None
        starts, most = np.zeros((len(indices), sequence_length), dtype=np.int32), 1
        for row, index in enumerate(indices.tolist()):
            if index < len(self._dataset):
                begins = self._dataset.boundaries(index)
                begins = begins[begins < sequence_length]  # the last token is a label alone
                starts[row, begins] = begins
                most = max(most, 1 + len(begins))
        return Documents(torch.from_numpy(np.maximum.accumulate(starts, axis=1)), most)

    def _out_of_range(self, rows: NDArray[np.int64], indices: NDArray[np.int64]) -> DataError:
        row, column = np.argwhere((rows >= self._vocab_size) | (rows < PADDING))[0].tolist()
        index = int(indices[row])
        return DataError(
            f"sample {index} holds the token {rows[row, column]}, which is not among the model's vocabulary of "
            f"{self._vocab_size} (0 … {self._vocab_size - 1}); it comes from {self._dataset.source(index)}. "
            "Use data made with this model's tokenizer"
        )


def _check_divides(global_batch: int, micro_batch: int, size: int) -> None:
    if global_batch % (micro_batch * size) != 0:
        raise ConfigError(
            f"train.global_batch={global_batch} is not a multiple of train.micro_batch={micro_batch} x "
            f"{size} data-parallel ranks = {micro_batch * size}; "
            f"use {max(1, round(global_batch / (micro_batch * size))) * micro_batch * size}"
        )
