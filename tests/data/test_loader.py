"""Batches: the same global batch on every grid, resume by position, padding, bad tokens, errors across the thread."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron.config.batches import Ramp
from megatron.data.dataset import ENDLESS, PADDING
from megatron.data.indexed import IndexedReader, IndexedWriter
from megatron.data.loader import BatchLoader
from megatron.data.pretraining import MegatronOrderDataset
from megatron.data.stream import Stream
from megatron.data.synthetic import SyntheticDataset
from megatron.model.loss import IGNORED
from megatron.utils.errors import ConfigError, DataError


class Counting:
    """Sample i is i·10, i·10 + 1, …; `bad` maps a sample to what it holds instead."""

    def __init__(self, length: int, bad: dict[int, list[int]] | None = None) -> None:
        self._length, self._bad = length, bad or {}

    def __len__(self) -> int:
        return self._length

    def sample(self, index: int) -> NDArray[np.int64]:
        assert index < self._length
        return np.array(self._bad.get(index, range(index * 10, index * 10 + 5)), dtype=np.int64)

    def source(self, index: int) -> str:
        return f"counting, sample {index}"


def global_batches(micro_batch: int, size: int, steps: int, position: int = 0, global_batch: int = 8) -> list[set[int]]:
    """First tokens of each global batch, put together from all ranks."""
    batches: list[set[int]] = [set() for _ in range(steps)]
    for rank in range(size):
        with BatchLoader(
            Counting(1000), global_batch=global_batch, micro_batch=micro_batch, rank=rank, size=size,
            vocab_size=10_000, position=position,
        ) as loader:  # fmt: skip
            for batch in batches:
                micro_batches = loader.next_batch()
                assert len(micro_batches) == global_batch // (micro_batch * size)
                for micro in micro_batches:
                    assert micro.tokens.shape == micro.labels.shape == (micro_batch, 4)
                    batch.update(micro.tokens[:, 0].tolist())
    return batches


@pytest.mark.parametrize(("micro_batch", "size"), [(1, 1), (8, 1), (2, 2), (1, 4), (2, 4), (1, 8)])
def test_a_global_batch_does_not_depend_on_the_grid(micro_batch: int, size: int) -> None:
    assert global_batches(micro_batch, size, 3) == [{10 * i for i in range(8 * s, 8 * s + 8)} for s in range(3)]


def test_samples_are_dealt_in_megatrons_order() -> None:
    def dealt(rank: int) -> list[list[int]]:
        with BatchLoader(
            Counting(100), global_batch=8, micro_batch=2, rank=rank, size=2, vocab_size=1000, position=16
        ) as loader:
            return [(micro.tokens[:, 0] // 10).tolist() for micro in loader.next_batch()]

    assert dealt(0) == [[16, 17], [20, 21]]
    assert dealt(1) == [[18, 19], [22, 23]]


def test_labels_are_the_next_tokens() -> None:
    with BatchLoader(Counting(4), global_batch=2, micro_batch=2, rank=0, size=1, vocab_size=100) as loader:
        (micro,) = loader.next_batch()
    assert micro.tokens.tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert micro.labels.tolist() == [[1, 2, 3, 4], [11, 12, 13, 14]]
    assert micro.tokens.dtype == micro.labels.dtype == torch.int64
    assert micro.tokens.is_contiguous() and micro.labels.is_contiguous()


@pytest.mark.parametrize("grid", [(1, 1), (2, 2)])
def test_resuming_by_position_equals_going_on(grid: tuple[int, int]) -> None:
    micro_batch, size = grid
    dataset = SyntheticDataset(vocab_size=500, sequence_length=8, seed=3)

    def batches(steps: int, position: int) -> tuple[list[torch.Tensor], int]:
        with BatchLoader(
            dataset, global_batch=4, micro_batch=micro_batch, rank=size - 1, size=size, vocab_size=500,
            position=position,
        ) as loader:  # fmt: skip
            tokens = [torch.cat([micro.tokens for micro in loader.next_batch()]) for _ in range(steps)]
            return tokens, loader.position

    whole, end = batches(6, 0)
    first, stopped = batches(2, 0)
    rest, resumed_end = batches(4, stopped)
    assert (stopped, end, resumed_end) == (8, 24, 24)
    assert torch.equal(torch.stack(whole), torch.stack(first + rest))


def test_position_counts_what_was_handed_out_not_what_was_read_ahead() -> None:
    with BatchLoader(Counting(1000), global_batch=4, micro_batch=1, rank=0, size=2, vocab_size=10_000) as loader:
        assert loader.position == 0
        loader.next_batch()
        assert loader.position == 4


def test_the_batch_size_may_change_at_a_resume() -> None:
    assert global_batches(1, 2, 2, position=12, global_batch=6) == [
        {10 * i for i in range(12, 18)},
        {10 * i for i in range(18, 24)},
    ]


def test_padding_becomes_a_valid_token_without_loss() -> None:
    dataset = Counting(2, bad={1: [7, 8, 9, PADDING, PADDING]})
    with BatchLoader(dataset, global_batch=2, micro_batch=2, rank=0, size=1, vocab_size=20) as loader:
        (micro,) = loader.next_batch()
    assert micro.tokens[1].tolist() == [7, 8, 9, 0]
    assert micro.labels[1].tolist() == [8, 9, IGNORED, IGNORED]


@pytest.mark.parametrize("token", [50, 51, 10**9, -2, -(2**31)])
def test_a_token_outside_the_vocabulary_is_found_before_use(token: int) -> None:
    dataset = Counting(3, bad={1: [1, 2, 3, 4, token]})
    with (
        BatchLoader(dataset, global_batch=1, micro_batch=1, rank=0, size=1, vocab_size=50) as loader,
        pytest.raises(DataError) as error,
    ):
        loader.next_batch()
        loader.next_batch()
    for words in ("sample 1", str(token), "vocabulary of 50", "counting, sample 1"):
        assert words in str(error.value)


def test_the_largest_id_is_allowed() -> None:
    dataset = Counting(1, bad={0: [49, 0, 49, 0, 49]})
    with BatchLoader(dataset, global_batch=1, micro_batch=1, rank=0, size=1, vocab_size=50) as loader:
        assert loader.next_batch()[0].labels.tolist() == [[0, 49, 0, 49]]


def test_the_end_of_the_data_comes_after_the_last_whole_batch() -> None:
    with BatchLoader(Counting(10), global_batch=4, micro_batch=2, rank=1, size=2, vocab_size=1000) as loader:
        assert [loader.next_batch()[0].tokens[0, 0].item() for _ in range(2)] == [20, 60]
        for _ in range(2):  # asked again, it says so again
            with pytest.raises(DataError, match=r"end after sample 10.*samples 8 to 12.*data.samples"):
                loader.next_batch()
    assert loader.position == 8


def test_the_last_batch_can_be_filled_with_samples_that_carry_no_loss() -> None:
    def counted(rank: int) -> list[int]:
        predictions = []
        with BatchLoader(
            Counting(5), global_batch=4, micro_batch=1, rank=rank, size=2, vocab_size=1000, pad_last=True
        ) as loader:
            for _ in range(2):
                predictions += [int((micro.labels != IGNORED).sum()) for micro in loader.next_batch()]
            with pytest.raises(DataError):
                loader.next_batch()
        return predictions

    assert counted(0) == [4, 4, 4, 0]
    assert counted(1) == [4, 4, 0, 0]


class Failing(Counting):
    def sample(self, index: int) -> NDArray[np.int64]:
        if index == 2:
            raise OSError("the disk is gone")
        return super().sample(index)


def test_an_error_while_reading_ahead_is_raised_in_its_turn() -> None:
    with BatchLoader(Failing(100), global_batch=1, micro_batch=1, rank=0, size=1, vocab_size=1000) as loader:
        assert loader.next_batch()[0].tokens[0, 0] == 0
        assert loader.next_batch()[0].tokens[0, 0] == 10
        with pytest.raises(OSError, match="the disk is gone"):
            loader.next_batch()


def test_closing_ends_the_thread_with_batches_unread() -> None:
    before = threading.active_count()
    loaders = [
        BatchLoader(Counting(ENDLESS), global_batch=1, micro_batch=1, rank=0, size=1, vocab_size=10**9)
        for _ in range(3)
    ]
    assert threading.active_count() == before + 3
    for loader in loaders:
        loader.close()
        loader.close()
    assert threading.active_count() == before


def test_a_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"global_batch=10 .*micro_batch=2 x 2 .* = 4; use 8"):
        BatchLoader(Counting(100), global_batch=10, micro_batch=2, rank=0, size=2, vocab_size=1000)


class InDocuments(Counting):
    """Sample i has a document at i and one at its last token, which only is a label."""

    def boundaries(self, index: int) -> NDArray[np.int64]:
        return np.array([index, 4]) if index else np.array([], dtype=np.int64)


def test_micro_batches_know_their_documents_where_they_are_asked_to() -> None:
    options = {"global_batch": 4, "micro_batch": 2, "rank": 0, "size": 1, "vocab_size": 100}
    with BatchLoader(InDocuments(3), pad_last=True, document_mask=True, **options) as loader:
        first, second = (batch.documents for batch in loader.next_batch())
    assert first is not None and second is not None
    assert first.starts.dtype == torch.int32
    assert first.starts.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]] and first.most == 2
    assert second.starts.tolist() == [[0, 0, 2, 2], [0, 0, 0, 0]] and second.most == 2  # the last is padding
    with BatchLoader(InDocuments(4), **options) as loader:
        assert all(batch.documents is None for batch in loader.next_batch())


def test_a_ramp_changes_the_batch_at_a_position_on_every_grid_alike() -> None:
    ramp = Ramp(((0, 4), (10, 8), (30, 16)))  # 0 4 8 | 12 20 28 | 36 52
    for micro_batch, size in ((1, 1), (2, 2), (1, 4)):
        for start, skipped in ((0, 0), (12, 3)):
            loaders = [
                BatchLoader(
                    Counting(1000), global_batch=ramp, micro_batch=micro_batch, rank=rank, size=size,
                    vocab_size=10_000, position=start,
                )
                for rank in range(size)
            ]  # fmt: skip
            bounds = [0, 4, 8, 12, 20, 28, 36, 52, 68][skipped:]
            for first, last in pairwise(bounds):
                assert all(loader.position == first for loader in loaders)
                read = {
                    int(token) // 10
                    for loader in loaders
                    for micro in loader.next_batch()
                    for token in micro.tokens[:, 0]
                }
                assert read == set(range(first, last))
            for loader in loaders:
                loader.close()


def test_each_batch_of_a_ramp_must_divide() -> None:
    with pytest.raises(ConfigError, match=r"global_batch=6 .* = 4; use 8"):
        BatchLoader(Counting(9), global_batch=Ramp(((0, 8), (9, 6))), micro_batch=2, rank=0, size=2, vocab_size=9)


class InRows(Counting):
    """The same samples, all of a step at once."""

    sequence_length = 4

    def __init__(self, length: int, bad: dict[int, list[int]] | None = None) -> None:
        super().__init__(length, bad)
        self.announced: list[int] = []

    def fill(
        self, indices: NDArray[np.int64], tokens: NDArray[np.int64], labels: NDArray[np.int64], at: NDArray[np.int64]
    ) -> tuple[int, int]:
        rows = np.array([self.sample(index) for index in indices.tolist()])
        tokens[at], labels[at] = rows[:, :-1], rows[:, 1:]
        return (int(rows.min()), int(rows.max())) if len(rows) else (0, -1)

    def announce(self, indices: NDArray[np.int64]) -> None:
        assert (indices < len(self)).all()
        assert len(indices), "a dataset is never told of nothing"
        self.announced += indices.tolist()

    def boundaries(self, index: int) -> NDArray[np.int64]:
        return np.array([1 + index % 3])

    def boundaries_of(self, indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        return [self.boundaries(index) for index in indices.tolist()]


@pytest.mark.parametrize("document_mask", [False, True])
def test_reading_rows_at_once_gives_the_same_batches(document_mask: bool) -> None:
    bad = {3: [7, 8, PADDING, PADDING, PADDING], 8: [1, 2, 3, 4, PADDING]}
    options = {"global_batch": 12, "micro_batch": 2, "rank": 1, "size": 2, "vocab_size": 10_000, "pad_last": True}

    class OneByOne(Counting):
        boundaries = InRows.boundaries

    with (
        BatchLoader(InRows(29, bad), document_mask=document_mask, **options) as fast,
        BatchLoader(OneByOne(29, bad), document_mask=document_mask, **options) as slow,
    ):
        for _ in range(3):
            for one, other in zip(fast.next_batch(), slow.next_batch(), strict=True):
                assert one.tokens.tolist() == other.tokens.tolist() and one.labels.tolist() == other.labels.tolist()
                assert one.tokens.is_contiguous() and one.labels.is_contiguous()
                if document_mask:
                    assert one.documents is not None and other.documents is not None
                    assert one.documents.starts.tolist() == other.documents.starts.tolist()
                    assert one.documents.most == other.documents.most


@pytest.mark.parametrize(("at", "token"), [(0, 50), (4, 51), (2, -2)])
def test_a_token_outside_the_vocabulary_is_found_in_rows(at: int, token: int) -> None:
    sample = [1, 2, 3, 4, 5]
    sample[at] = token
    dataset = InRows(3, bad={1: sample})
    with (
        BatchLoader(dataset, global_batch=3, micro_batch=1, rank=0, size=1, vocab_size=50) as loader,
        pytest.raises(DataError, match=rf"sample 1 holds the token {token}, .*counting, sample 1"),
    ):
        loader.next_batch()


def test_what_is_held_is_never_written_over() -> None:
    """Memory is used again, but not while a batch, or anything made of it without a copy, is still there."""
    with BatchLoader(InRows(ENDLESS), global_batch=4, micro_batch=2, rank=0, size=1, vocab_size=10**9) as loader:
        kept, addresses = [], set()
        for step in range(40):
            batch = loader.next_batch()
            addresses.add(batch[0].tokens.data_ptr())
            if step % 3 == 0:
                kept.append((step, batch[1].labels[1:].t(), batch[0].tokens.numpy()[0]))
            del batch
        for step, labels, tokens in kept:
            first = 40 * step
            assert labels[:, 0].tolist() == [first + 31, first + 32, first + 33, first + 34]
            assert tokens.tolist() == [first, first + 1, first + 2, first + 3]
        assert len(addresses) < 40, "and it is used again"


def test_the_system_is_told_of_this_ranks_samples_before_they_are_read() -> None:
    dataset = InRows(44)
    ramp = Ramp(((0, 8), (16, 16)))
    with BatchLoader(
        dataset, global_batch=ramp, micro_batch=2, rank=1, size=2, vocab_size=10_000, pad_last=True, readahead=2
    ) as loader:
        expected = []
        for _ in range(4):
            tokens = [int(token) for micro in loader.next_batch() for token in micro.tokens[:, 0]]
            expected += [token // 10 for token in tokens if token]  # 0 fills up
            assert dataset.announced[: len(expected)] == expected
    announced = dataset.announced
    assert announced == sorted(set(announced)), "each once, in their order"
    assert announced == [index for index in range(44) if index % 4 >= 2]
    silent = InRows(44)
    with BatchLoader(silent, global_batch=8, micro_batch=2, rank=1, size=2, vocab_size=10_000) as loader:
        loader.next_batch()
    assert silent.announced == []


def test_a_stored_order_is_read_to_its_last_sample(tmp_path: Path) -> None:
    prefix = str(tmp_path / "pair")
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add_documents(np.arange(1, 34, dtype=np.uint16), np.array([33]))
        writer.close()
    dataset = MegatronOrderDataset(Stream(IndexedReader(prefix)), sequence_length=4, samples=8, seed=1)
    with BatchLoader(dataset, global_batch=4, micro_batch=2, rank=0, size=2, vocab_size=100, readahead=3) as loader:
        seen = [loader.next_batch() for _ in range(len(dataset) // 4)]
        assert len(seen) == 2
        with pytest.raises(DataError, match="the data end after sample 8"):
            loader.next_batch()
