"""Samples of one pair in both orders, against the joined documents."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.dataset import ENDLESS
from megatron.data.indexed import IndexedReader, IndexedWriter
from megatron.data.pretraining import MegatronOrderDataset, StableOrderDataset
from megatron.data.stream import Stream
from megatron.utils.errors import DataError

from .conftest import MakePair


def stream(prefix: str) -> Stream:
    return Stream(IndexedReader(prefix))


def numbered(sizes: list[int]) -> list[list[int]]:
    """Documents of these sizes in which no token occurs twice."""
    ends = np.cumsum([0, *sizes])
    return [list(range(low, high)) for low, high in pairwise(ends)]


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=10).filter(lambda sizes: sum(sizes) > 7),
    sequence_length=st.integers(1, 7),
    samples=st.integers(1, 40),
)
@settings(max_examples=80, deadline=None)
def test_megatron_samples_are_runs_of_the_shuffled_documents(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], sequence_length: int, samples: int
) -> None:
    prefix = str(tmp_path_factory.mktemp("pair") / "p")
    documents = numbered(sizes)
    with IndexedWriter(prefix, "<u2") as writer:
        for document in documents:
            writer.add_sequence(document)
            writer.end_document()
    dataset = MegatronOrderDataset(stream(prefix), sequence_length=sequence_length, samples=samples, seed=3)
    tokens = [token for number in dataset.order.document_index for token in documents[number]]
    for index in range(len(dataset)):
        start = int(dataset.order.shuffle_index[index]) * sequence_length
        sample = dataset.sample(index)
        assert sample.dtype == np.int64
        assert sample.tolist() == tokens[start : start + sequence_length + 1]
    assert sorted(dataset.order.shuffle_index.tolist()) == list(range(len(dataset)))


def test_megatron_samples_of_the_real_pair(shared: Path) -> None:
    prefix = str(shared / "data/megatron/meg-gpt2-openwebtext_text_document")
    dataset = MegatronOrderDataset(stream(prefix), sequence_length=1024, samples=3000, seed=1234)
    reader = IndexedReader(prefix)
    order = dataset.order.document_index.tolist()
    tokens = np.concatenate([reader.read(number) for number in order])
    for index in (0, 1, 77, len(dataset) - 1):
        start = int(dataset.order.shuffle_index[index]) * 1024
        assert dataset.sample(index).tolist() == tokens[start : start + 1025].tolist()


def test_every_stable_epoch_visits_every_window_once_in_another_order(make_pair: MakePair) -> None:
    prefix = make_pair(numbered([30, 0, 51, 23]))  # 104 tokens: 20 windows of 5, and 3 tokens that are left over
    dataset = StableOrderDataset(stream(prefix), sequence_length=5, seed=1)
    assert dataset.windows_per_epoch == 20
    epochs = [[dataset.sample(20 * epoch + i).tolist() for i in range(20)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [list(range(5 * w, 5 * w + 6)) for w in range(20)]
    assert epochs[0] != sorted(epochs[0])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert len(dataset) == ENDLESS


def test_stable_windows_share_exactly_one_token(make_pair: MakePair) -> None:
    dataset = StableOrderDataset(stream(make_pair(numbered([26]))), sequence_length=5, seed=9)
    counts = Counter(token for i in range(5) for token in dataset.sample(i).tolist())
    assert {token for token, count in counts.items() if count == 2} == {5, 10, 15, 20}
    assert sorted(counts) == list(range(26))


def test_a_stable_sample_depends_on_its_position_alone(make_pair: MakePair) -> None:
    prefix = make_pair(numbered([40, 60]))
    first = StableOrderDataset(stream(prefix), sequence_length=7, seed=5)
    forwards = [first.sample(i).tolist() for i in range(60)]
    second = StableOrderDataset(stream(prefix), sequence_length=7, seed=5)
    backwards = [second.sample(i).tolist() for i in reversed(range(60))]
    assert forwards == backwards[::-1]
    other = StableOrderDataset(stream(prefix), sequence_length=7, seed=6)
    assert forwards != [other.sample(i).tolist() for i in range(60)]


def test_less_than_one_window_is_an_error_in_the_stable_order(make_pair: MakePair) -> None:
    prefix = make_pair(numbered([4, 4]))
    assert StableOrderDataset(stream(prefix), sequence_length=7, seed=1).sample(0).tolist() == list(range(8))
    with pytest.raises(DataError, match=r"8 tokens.* the 9 that data.sequence_length=8.*at most 7"):
        StableOrderDataset(stream(prefix), sequence_length=8, seed=1)


def test_megatrons_order_repeats_documents_to_fill_a_window(make_pair: MakePair) -> None:
    dataset = MegatronOrderDataset(stream(make_pair(numbered([2, 3]))), sequence_length=8, samples=3, seed=1)
    assert len(dataset) == 3
    assert {len(dataset.sample(index)) for index in range(3)} == {9}
    assert {token for index in range(3) for token in dataset.sample(index).tolist()} == set(range(5))


def test_a_pair_without_tokens_is_an_error(make_pair: MakePair) -> None:
    with pytest.raises(DataError, match="0 tokens"):
        MegatronOrderDataset(stream(make_pair([[], []])), sequence_length=4, samples=1, seed=1)


@pytest.mark.parametrize("order", ["megatron", "stable"])
def test_a_stored_negative_token_is_damage_and_not_padding(make_pair: MakePair, order: str) -> None:
    prefix = make_pair([[1, 2, 3, 4, -1]], dtype="<i4")
    dataset = (
        MegatronOrderDataset(stream(prefix), sequence_length=4, samples=1, seed=1)
        if order == "megatron"
        else StableOrderDataset(stream(prefix), sequence_length=4, seed=1)
    )
    with pytest.raises(DataError, match=r"corpus_text_document.bin .* holds the token -1"):
        dataset.sample(0)


def begins_of(stream: list[tuple[int, int]], start: int, length: int) -> list[int]:
    """Where in a window of (document, token) pairs another document begins."""
    window = stream[start : start + length]
    return [at for at in range(1, len(window)) if window[at][0] != window[at - 1][0]]


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=10).filter(lambda sizes: sum(sizes) > 8),
    sequence_length=st.integers(1, 7),
)
@settings(max_examples=60, deadline=None)
def test_boundaries_are_where_documents_begin(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], sequence_length: int
) -> None:
    prefix = str(tmp_path_factory.mktemp("pair") / "p")
    documents = numbered(sizes)
    with IndexedWriter(prefix, "<u2") as writer:
        for document in documents:
            writer.add_sequence(document)
            writer.end_document()
    megatron = MegatronOrderDataset(stream(prefix), sequence_length=sequence_length, samples=30, seed=3)
    # Numbered by their place in the order: of two copies of a document, one after the other, the second is another.
    order = megatron.order.document_index.tolist()
    pairs = [(entry, token) for entry, number in enumerate(order) for token in documents[number]]
    for index in range(len(megatron)):
        start = int(megatron.order.shuffle_index[index]) * sequence_length
        assert megatron.boundaries(index).tolist() == begins_of(pairs, start, sequence_length + 1)
    stable = StableOrderDataset(stream(prefix), sequence_length=sequence_length, seed=1)
    pairs = [(number, token) for number, document in enumerate(documents) for token in document]
    for index in range(2 * stable.windows_per_epoch):
        start = stable.window(index) * sequence_length
        assert stable.boundaries(index).tolist() == begins_of(pairs, start, sequence_length + 1)


def test_a_document_of_several_sequences_is_one_in_file_order(tmp_path: Path) -> None:
    """Megatron's order shuffles sequences, so there each is a document; in file order they follow each other."""
    prefix = str(tmp_path / "p")
    with IndexedWriter(prefix, "<u2") as writer:
        for document in ([[0, 1, 2], [3, 4]], [[5, 6], [], [7, 8, 9]]):
            for sequence in document:
                writer.add_sequence(sequence)
            writer.end_document()
    assert StableOrderDataset(stream(prefix), sequence_length=9, seed=0).boundaries(0).tolist() == [5]
    megatron = MegatronOrderDataset(stream(prefix), sequence_length=9, samples=1, seed=0)
    assert len(megatron.boundaries(0)) == 3


@pytest.mark.parametrize("order", ["megatron", "stable"])
def test_boundaries_of_the_real_pair_are_behind_its_end_tokens(shared: Path, order: str) -> None:
    """Every document of this pair ends with the token 4999 and has it nowhere else, as Megatron's rule supposes."""
    prefix, end = str(shared / "data/megatron/meg-gpt2-openwebtext_text_document"), 4999
    dataset: MegatronOrderDataset | StableOrderDataset
    if order == "megatron":
        dataset = MegatronOrderDataset(stream(prefix), sequence_length=1024, samples=1000, seed=1234)
    else:
        dataset = StableOrderDataset(stream(prefix), sequence_length=1024, seed=1234)
    found = 0
    for index in range(300):
        sample, boundaries = dataset.sample(index), dataset.boundaries(index)
        assert boundaries.tolist() == (np.flatnonzero(sample[:-1] == end) + 1).tolist()
        found += len(boundaries)
    assert found > 100
