"""The stream in file order, and fixed sets made of its beginning."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megatron.data.windows import FixedSet, StreamWindows
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


def test_a_fixed_set_takes_the_beginning_of_each_and_no_more_than_there_is(make_pair: MakePair) -> None:
    long = StreamWindows(make_pair([list(range(100))], name="long"), 4)
    short = StreamWindows(make_pair([list(range(200, 207))], name="short"), 4)
    fixed = FixedSet([(long, 3), (short, 5), (long, 1)])
    assert len(fixed) == 6
    assert [int(fixed.sample(i)[0]) for i in range(6)] == [0, 4, 8, 200, 204, 0]
    assert "short" in fixed.source(3) and "long" in fixed.source(5)


def test_windows_and_fixed_sets_know_where_documents_begin(make_pair: MakePair) -> None:
    windows = StreamWindows(make_pair([[0, 1, 2], [], [3], [4, 5, 6, 7], [8, 9]]), 4)
    assert [windows.sample(i).tolist() for i in range(3)] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, -1, -1, -1]]
    assert [windows.boundaries(i).tolist() for i in range(3)] == [[3, 4], [4], []]
    fixed = FixedSet([(windows, 1), (windows, 2)])
    assert [fixed.boundaries(i).tolist() for i in range(3)] == [[3, 4], [3, 4], [4]]
