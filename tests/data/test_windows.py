"""The stream in file order."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megatron.data.indexed import IndexedReader
from megatron.data.stream import Stream
from megatron.data.windows import StreamWindows
from megatron.utils.errors import DataError

from .conftest import MakePair


@pytest.mark.parametrize("tokens", range(2, 12))
def test_windows_predict_every_token_but_the_first_once(make_pair: MakePair, tokens: int) -> None:
    windows = StreamWindows(make_pair([list(range(3)), list(range(3, tokens))] if tokens > 3 else [range(tokens)]), 4)
    predictions = []
    for index in range(len(windows)):
        sample = windows.sample(index).tolist()
        assert len(sample) == 5
        predictions += [(known, label) for known, label in pairwise(sample) if label != -1]
    assert predictions == [(token, token + 1) for token in range(tokens - 1)]


def test_the_last_window_is_padded_and_the_others_are_not(make_pair: MakePair) -> None:
    windows = StreamWindows(make_pair([list(range(7))]), 4)
    assert [windows.sample(i).tolist() for i in range(2)] == [[0, 1, 2, 3, 4], [4, 5, 6, -1, -1]]
    exact = StreamWindows(make_pair([list(range(9))], name="exact"), 4)
    assert len(exact) == 2
    assert exact.sample(1).tolist() == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("documents", [[], [[]], [[5]]])
def test_nothing_to_predict_is_an_error(make_pair: MakePair, documents: list[list[int]]) -> None:
    with pytest.raises(DataError, match="at least 2"):
        StreamWindows(make_pair(documents), 4)


def test_no_more_windows_than_asked_for_and_no_more_than_there_are(make_pair: MakePair) -> None:
    prefix = make_pair([list(range(30))])
    assert [len(StreamWindows(prefix, 4, most)) for most in (3, 8, 100)] == [3, 8, 8]
    assert StreamWindows(prefix, 4, 3).sample(2).tolist() == [8, 9, 10, 11, 12]


def test_windows_of_some_of_the_sequences(make_pair: MakePair) -> None:
    prefix = make_pair([[0, 1, 2], [], [3, 4], [5, 6, 7, 8], [9]])
    windows = StreamWindows(Stream(IndexedReader(prefix), 1, 4), 4)
    assert [windows.sample(i).tolist() for i in range(len(windows))] == [[3, 4, 5, 6, 7], [7, 8, -1, -1, -1]]
    assert [windows.boundaries(i).tolist() for i in range(2)] == [[2], []]
    assert "token 7 onwards" in windows.source(1)


def test_windows_know_where_documents_begin(make_pair: MakePair) -> None:
    windows = StreamWindows(make_pair([[0, 1, 2], [], [3], [4, 5, 6, 7], [8, 9]]), 4)
    assert [windows.sample(i).tolist() for i in range(3)] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, -1, -1, -1]]
    assert [windows.boundaries(i).tolist() for i in range(3)] == [[3, 4], [4], []]
