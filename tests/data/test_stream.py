"""Pieces of a pair: read back, announced, and traced to their documents."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.explain import origin_of
from megatron.data.indexed import IndexedReader, IndexedWriter
from megatron.data.pretraining import MegatronOrderDataset, StableOrderDataset, StoredDataset
from megatron.data.stream import Stream
from megatron.data.windows import StreamWindows

from .conftest import MakePair


@given(
    documents=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=8).filter(
        lambda documents: sum(map(sum, documents)) > 8
    ),
    sequence_length=st.integers(1, 7),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_excerpts_are_what_the_sample_is_made_of(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], sequence_length: int, data: st.DataObject
) -> None:
    """Of every dataset of stored tokens, over a part of a pair whose documents may have several sequences, or none."""
    prefix = str(tmp_path_factory.mktemp("pair") / "p")
    token, owners = 0, []
    with IndexedWriter(prefix, "<u2") as writer:
        for number, sizes in enumerate(documents):
            for size in sizes:
                writer.add_sequence(range(token, token + size))
                token += size
                owners.append(number)
            writer.end_document()
    reader = IndexedReader(prefix)
    first = data.draw(st.integers(0, len(reader)))
    stop = data.draw(st.integers(first, len(reader)))
    stream = Stream(reader, first, stop)
    if stream.num_tokens <= sequence_length + 1:
        return
    made: list[StoredDataset] = [
        MegatronOrderDataset(stream, sequence_length=sequence_length, samples=20, seed=1),
        StableOrderDataset(stream, sequence_length=sequence_length, seed=1),
        StreamWindows(stream, sequence_length),
    ]
    for dataset in made:
        for index in range(min(len(dataset), 12)):
            excerpts = dataset.excerpts(index)
            found = [
                token
                for excerpt in excerpts
                for token in reader.read(excerpt.sequence).tolist()[excerpt.start : excerpt.stop]
            ]
            sample = dataset.sample(index).tolist()
            assert found + [-1] * (sequence_length + 1 - len(found)) == sample
            assert all(first <= excerpt.sequence < stop for excerpt in excerpts)
            assert [excerpt.document for excerpt in excerpts] == [owners[excerpt.sequence] for excerpt in excerpts]
            assert all(excerpt.start < excerpt.stop for excerpt in excerpts)
            origin = origin_of(dataset, index)
            assert origin is not None and [excerpt for excerpt, _ in origin.excerpts] == excerpts


def test_what_is_announced_are_the_bytes_of_the_samples(make_pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, length, advice: told.append((start, length)))
    prefix = make_pair([range(40), range(100, 160)], dtype="<i4")
    dataset = StableOrderDataset(Stream(IndexedReader(prefix)), sequence_length=9, seed=3)
    dataset.announce(np.array([0, 5, 11]))
    content = Path(prefix + ".bin").read_bytes()
    assert [np.frombuffer(content[start : start + length], "<i4").tolist() for start, length in told] == [
        dataset.sample(index).tolist() for index in (0, 5, 11)
    ]


def test_epochs_of_the_stable_order_are_told(make_pair: MakePair) -> None:
    dataset = StableOrderDataset(Stream(IndexedReader(make_pair([range(50)]))), sequence_length=7, seed=3)
    epochs = [origin.epoch for origin in (origin_of(dataset, index) for index in (0, 6, 7, 20, 21)) if origin]
    assert epochs == [0, 0, 1, 2, 3]
