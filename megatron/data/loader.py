"""From samples to the micro-batches of one data-parallel rank, a step ahead of the trainer.

A global batch is always the next `global_batch` samples of the order, whatever the micro-batch and the number of data
ranks, so the position in the order is all there is to save. `rank` and `size` are integers: this module knows no
process groups and no devices.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from megatron.data.dataset import PADDING, Dataset
from megatron.data.windows import empty_sample
from megatron.kernels.runs import Documents
from megatron.model.loss import IGNORED
from megatron.utils.errors import ConfigError, DataError

_AHEAD = 2  # steps that are read ahead
_POLL_S = 0.1


@dataclass(frozen=True)
class MicroBatch:
    """What a forward pass reads: `tokens` i64[b, s], all valid ids; `labels` i64[b, s], some `IGNORED`; the `documents`
    that the samples are packed of, where attention is to stay within them."""

    tokens: torch.Tensor
    labels: torch.Tensor
    documents: Documents | None = None


class BatchLoader:
    """The micro-batches of data rank `rank` of `size`, step by step from sample `position` of the order on.

    In Megatron's order: micro-step t of a global batch that starts at sample c takes the samples from
    c + t·micro_batch·size on, rank r the r-th run of `micro_batch` of them. A thread reads ahead; its errors are raised
    by `next_batch`. With `pad_last`, a last global batch that the dataset cannot fill is filled with samples that
    carry no loss. With `document_mask`, micro-batches know their documents. Raises ConfigError if the global batch does
    not divide.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int,
        size: int,
        vocab_size: int,
        position: int = 0,
        pad_last: bool = False,
        document_mask: bool = False,
    ) -> None:
        assert 0 <= rank < size and position >= 0, (rank, size, position)
        if global_batch % (micro_batch * size) != 0:
            raise ConfigError(
                f"train.global_batch={global_batch} is not a multiple of train.micro_batch={micro_batch} x "
                f"{size} data-parallel ranks = {micro_batch * size}; "
                f"use {max(1, round(global_batch / (micro_batch * size))) * micro_batch * size}"
            )
        self._dataset = dataset
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._rank = rank
        self._size = size
        self._vocab_size = vocab_size
        self._pad_last = pad_last
        self._document_mask = document_mask
        self._position = position
        self._failure: BaseException | None = None
        self._ready: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(maxsize=_AHEAD)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(position,), name="batch-loader", daemon=True)
        self._thread.start()

    @property
    def position(self) -> int:
        """Samples of the order consumed by the batches handed out: the state to save and to resume from."""
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
                self._position += self._global_batch
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
                item = self._read_step(position)
            except BaseException as error:  # handed to the trainer's thread, which raises it
                item = error
            position += self._global_batch
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

    def _read_step(self, position: int) -> list[MicroBatch]:
        available = len(self._dataset)
        last = position + self._global_batch
        if position >= available or (last > available and not self._pad_last):
            raise DataError(
                f"the data end after sample {available:,}, but the next step reads samples {position:,} to {last:,}; "
                "raise data.samples (which makes another order) or stop earlier with train.steps"
            )
        stride = self._micro_batch * self._size
        first = range(position + self._rank * self._micro_batch, last, stride)
        return [self._read_micro_batch(start, available) for start in first]

    def _read_micro_batch(self, start: int, available: int) -> MicroBatch:
        indices = range(start, start + self._micro_batch)
        samples = [self._dataset.sample(index) if index < available else None for index in indices]
        sequence_length = next((len(sample) - 1 for sample in samples if sample is not None), None)
        if sequence_length is None:  # nothing but padding: its width is that of any sample
            sequence_length = len(self._dataset.sample(0)) - 1
        rows = np.stack([empty_sample(sequence_length) if sample is None else sample for sample in samples])
        padding = rows == PADDING
        if rows.max() >= self._vocab_size or rows.min() < PADDING:
            raise self._out_of_range(rows, start)
        tokens = np.where(padding, 0, rows)[:, :-1]
        labels = np.where(padding, IGNORED, rows)[:, 1:]
        documents = self._documents(indices, available, sequence_length) if self._document_mask else None
        return MicroBatch(_as_tensor(tokens), _as_tensor(labels), documents)

    def _documents(self, indices: range, available: int, sequence_length: int) -> Documents:
        """The documents of these samples, of which those past the end of the data have none."""
        starts, most = np.zeros((len(indices), sequence_length), dtype=np.int32), 1
        for row, index in enumerate(indices):
            if index < available:
                begins = self._dataset.boundaries(index)
                begins = begins[begins < sequence_length]  # the last token is a label alone
                starts[row, begins] = begins
                most = max(most, 1 + len(begins))
        return Documents(torch.from_numpy(np.maximum.accumulate(starts, axis=1)), most)

    def _out_of_range(self, rows: NDArray[np.int64], start: int) -> DataError:
        row, column = np.argwhere((rows >= self._vocab_size) | (rows < PADDING))[0].tolist()
        return DataError(
            f"sample {start + row} holds the token {rows[row, column]}, which is not among the model's vocabulary of "
            f"{self._vocab_size} (0 … {self._vocab_size - 1}); it comes from {self._dataset.source(start + row)}. "
            "Use data made with this model's tokenizer"
        )


def _as_tensor(values: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
