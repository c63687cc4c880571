"""The `megatron` order against its published values and a slow reference; the keyed permutation."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.indexed import IndexedReader
from megatron.data.order import KeyedPermutation, megatron_order

Order = tuple[list[int], list[tuple[int, int]], list[int], int, bool]


def slow_order(sizes: list[int], sequence_length: int, samples: int, seed: int) -> Order:
    """Megatron's algorithm, step by step, one token position at a time."""
    tokens = sum(sizes)
    epochs = 1
    while (epochs * tokens - 1) // sequence_length < samples:
        epochs += 1
    total = (epochs * tokens - 1) // sequence_length
    separate, before = False, 0
    if epochs > 1:
        before = ((epochs - 1) * tokens - 1) // sequence_length
        separate = samples - before < int(0.80 * ((tokens - 1) // sequence_length))
    generator = np.random.RandomState(seed)

    def block(copies: int) -> list[int]:
        documents = np.array(list(range(len(sizes))) * copies, dtype=np.int32)
        generator.shuffle(documents)
        return documents.tolist()

    document_index = block(epochs - 1) + block(1) if separate else block(epochs)
    sample_index = [(0, 0)]
    entry, offset = 0, 0
    for _ in range(total):
        remaining = sequence_length
        while remaining:
            step = min(remaining, sizes[document_index[entry]] - offset)
            offset, remaining = offset + step, remaining - step
            while entry + 1 < len(document_index) and offset == sizes[document_index[entry]]:
                entry, offset = entry + 1, 0
        sample_index.append((entry, offset))

    def permutation(low: int, high: int) -> list[int]:
        numbers = np.arange(low, high, dtype=np.uint32)
        generator.shuffle(numbers)
        return numbers.tolist()

    shuffle = permutation(0, before) + permutation(before, total) if separate else permutation(0, total)
    return document_index, sample_index, shuffle, epochs, separate


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(sum),
    sequence_length=st.integers(1, 9),
    samples=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=300, deadline=None)
def test_megatron_order_equals_the_slow_reference(
    sizes: list[int], sequence_length: int, samples: int, seed: int
) -> None:
    order = megatron_order(np.array(sizes, np.int32), sequence_length=sequence_length, samples=samples, seed=seed)
    documents, sample_index, shuffle, epochs, separate = slow_order(sizes, sequence_length, samples, seed)
    assert order.document_index.tolist() == documents
    assert [tuple(entry) for entry in order.sample_index.tolist()] == sample_index
    assert order.shuffle_index.tolist() == shuffle
    assert (order.epochs, order.separate_last_epoch) == (epochs, separate)
    assert len(order) >= samples


@pytest.mark.parametrize(
    ("sequence_length", "samples", "epochs", "separate", "total", "documents", "shuffle"),
    [
        (128, 1_000, 1, False, 10_390, [40, 394, 219], [6106, 8951, 6137]),
        (128, 12_000, 2, True, 20_780, [40, 394, 219], [2551, 7398, 2320]),
        (1024, 3_000, 3, True, 3_896, [47, 895, 909], [1703, 541, 1664]),
    ],
)
def test_megatron_order_of_a_real_corpus_has_the_known_values(
    shared: Path,
    sequence_length: int,
    samples: int,
    epochs: int,
    separate: bool,
    total: int,
    documents: list[int],
    shuffle: list[int],
) -> None:
    sizes = IndexedReader(shared / "data/megatron/meg-gpt2-openwebtext_text_document").sizes[:969]
    order = megatron_order(sizes, sequence_length=sequence_length, samples=samples, seed=1234)
    assert (order.epochs, order.separate_last_epoch, len(order)) == (epochs, separate, total)
    assert order.document_index[:3].tolist() == documents
    assert order.shuffle_index[:3].tolist() == shuffle
    if sequence_length == 1024:
        assert order.sample_index[1].tolist() == [1, 140]


def test_megatron_order_pinned_where_no_real_corpus_is_at_hand() -> None:
    order = megatron_order(np.array([5, 3, 7, 2], np.int32), sequence_length=4, samples=6, seed=1234)
    expected = slow_order([5, 3, 7, 2], 4, 6, 1234)
    assert order.document_index.tolist() == expected[0] == PINNED_DOCUMENTS
    assert order.shuffle_index.tolist() == expected[2] == PINNED_SHUFFLE
    assert order.separate_last_epoch is expected[4] is True


PINNED_DOCUMENTS = [0, 1, 2, 3, 1, 2, 3, 0]
PINNED_SHUFFLE = [0, 2, 3, 1, 7, 4, 6, 5]


def test_an_extra_sample_from_remainders_is_not_a_separate_epoch() -> None:
    order = megatron_order(np.array([10], np.int32), sequence_length=4, samples=7, seed=1)
    assert (order.epochs, order.separate_last_epoch, len(order)) == (3, False, 7)


def test_index_dtypes_are_megatrons() -> None:
    order = megatron_order(np.array([10, 10], np.int32), sequence_length=4, samples=2, seed=1)
    assert (order.document_index.dtype, order.sample_index.dtype, order.shuffle_index.dtype) == (
        np.int32,
        np.int32,
        np.uint32,
    )


@given(size=st.integers(1, 700), seed=st.integers(0, 2**64), epoch=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_keyed_permutation_is_one_to_one(size: int, seed: int, epoch: int) -> None:
    permutation = KeyedPermutation(size, seed=seed, epoch=epoch)
    assert sorted(map(permutation, range(size))) == list(range(size))


def test_keyed_permutation_never_changes() -> None:
    """Pinned: a run that is resumed after an upgrade must see the same order."""
    permutation = KeyedPermutation(1000, seed=1234, epoch=0)
    assert [permutation(i) for i in range(6)] == PINNED_PERMUTATION
    large = KeyedPermutation(10**12, seed=1234, epoch=3)
    assert [large(i) for i in (0, 1, 10**12 - 1)] == PINNED_LARGE


PINNED_PERMUTATION = [331, 939, 667, 402, 422, 540]
PINNED_LARGE = [812495076270, 760106222811, 824156279755]


def test_keyed_permutation_differs_between_seeds_and_epochs() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(map(KeyedPermutation(100, seed=seed, epoch=epoch), range(100)))

    orders = {order(seed, epoch) for seed in range(6) for epoch in range(6)}
    assert len(orders) == 36


@pytest.mark.parametrize("size", [6, 8, 37])
def test_keyed_permutation_sends_an_index_anywhere_alike(size: int) -> None:
    """Chi-squared over epochs, per index and per pair of neighbours; far outside for a weak round function."""
    epochs = 400 * size
    firsts = Counter()
    gaps = Counter()
    for epoch in range(epochs):
        permutation = KeyedPermutation(size, seed=7, epoch=epoch)
        firsts[permutation(0)] += 1
        gaps[(permutation(1) - permutation(0)) % size] += 1
    for counts, cells in ((firsts, range(size)), (gaps, range(1, size))):
        expected = epochs / len(cells)
        statistic = sum((counts[cell] - expected) ** 2 / expected for cell in cells)
        freedom = len(cells) - 1
        assert statistic < freedom + 5 * math.sqrt(2 * freedom)
