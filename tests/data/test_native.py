"""The compiled helpers of the data path against the same in numpy or Python."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import native
from megatron.data.order import KeyedPermutation

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


def test_what_was_built_loads() -> None:
    if not any(Path(native.__file__).with_name(f"_order{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
        pytest.skip("the helpers were not built when this was installed")
    assert native.load() is not None


@given(weights=WEIGHTS, start=st.integers(0, 10**9), length=st.integers(0, 200))
@settings(max_examples=100)
def test_greedy_choices(weights: list[float], start: int, length: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    counts = [round(share * start) for share in shares]
    again = list(counts)
    choices = native.greedy_choices(shares, counts, start, start + length)
    assert choices.tolist() == native.greedy_choices_in_python(shares, again, start, start + length).tolist()
    assert counts == again


def test_ties_go_to_the_first_member_as_they_do_in_megatron() -> None:
    counts = [0, 0, 0]
    assert native.greedy_choices([1 / 3] * 3, counts, 0, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]


@given(size=st.integers(1, 10**13), seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=100)
def test_permute(size: int, seed: int, data: st.DataObject) -> None:
    permutation = KeyedPermutation(size, seed=seed, epoch=3)
    indices = data.draw(st.lists(st.integers(0, size - 1), max_size=30))
    expected = [permutation(index) for index in indices]
    asked = np.array(indices, dtype=np.int64)
    assert permutation.of(asked).tolist() == expected
    keys, bits = permutation._key_words, permutation._half_bits
    assert native.permute_in_numpy(keys, bits, size, asked).tolist() == expected


def slow_split(
    stored: np.ndarray, pieces: list[tuple[int, int, int, int]], count: int, width: int
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Tokens, labels and all that was copied, token by token; −7 where nothing is written."""
    rows = [[-7] * (width + 1) for _ in range(count)]
    copied = []
    for start, row, column, length in pieces:
        for at in range(length):
            rows[row][column + at] = int(stored[start + at])
            copied.append(int(stored[start + at]))
    return [row[:-1] for row in rows], [row[1:] for row in rows], copied


@pytest.mark.parametrize("dtype", ["<u1", "<i1", "<i2", "<i4", "<i8", "<u2"])
@pytest.mark.parametrize("width", [1, 2, 9, 40])
def test_split(dtype: str, width: int) -> None:
    generator = np.random.default_rng(width)
    limits = np.iinfo(dtype)
    stored = generator.integers(limits.min, limits.max, 500, dtype=np.dtype(dtype), endpoint=True)
    pieces = []
    for row in generator.permutation(7)[:5].tolist():
        column = 0
        while column <= width:
            length = int(generator.integers(0, width + 2 - column))
            pieces.append((int(generator.integers(0, 450)), row, column, length))
            column += max(length, 1)
    for some in (pieces, pieces[:1], [(*pieces[0][:3], 0)]):
        tokens, labels, copied = slow_split(stored, some, 7, width)
        for function in (native.split, native.split_in_numpy):
            found = np.full((2, 7, width), -7, dtype=np.int64)
            low, high = function(stored, *(np.array(column) for column in zip(*some, strict=True)), found[0], found[1])
            assert found.tolist() == [tokens, labels]
            assert (low, high) == ((min(copied), max(copied)) if copied else (0, -1))


@pytest.mark.parametrize(
    "piece", [(-1, 0, 0, 1), (95, 0, 0, 6), (0, -1, 0, 1), (0, 4, 0, 1), (0, 0, -1, 1), (0, 0, 0, 8), (0, 3, 2, 6),
              (0, 0, 0, -1)],
)  # fmt: skip
def test_pieces_outside_are_a_bug_and_touch_no_memory(piece: tuple[int, ...]) -> None:
    out = np.zeros((2, 4, 6), dtype=np.int64)
    with pytest.raises(AssertionError):
        native.split(np.zeros(100, dtype=np.uint16), *(np.array([value]) for value in piece), out[0], out[1])


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum),
    sequence_length=st.integers(1, 9),
    copies=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=100)
def test_sample_index(sizes: list[int], sequence_length: int, copies: int, seed: int) -> None:
    documents = np.random.RandomState(seed).permutation(np.tile(np.arange(len(sizes), dtype=np.int32), copies))
    total = (copies * sum(sizes) - 1) // sequence_length
    arguments = np.array(sizes, dtype=np.int32), documents, sequence_length, total
    assert native.sample_index(*arguments).tolist() == native.sample_index_in_numpy(*arguments).tolist()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 255, 256, 257, 258, 1000, 5000])
@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_shuffle_is_that_of_numpy_and_leaves_the_generator_as_it_does(count: int, dtype: type) -> None:
    for seed in (0, 1234, 2**32 - 1):
        ours, numpys = np.random.RandomState(seed), np.random.RandomState(seed)
        for _ in range(3):  # from any place in the generator's state
            mine, theirs = np.arange(count, dtype=dtype), np.arange(count, dtype=dtype)
            native.shuffle(ours, mine)
            numpys.shuffle(theirs)
            assert mine.tolist() == theirs.tolist()
            assert ours.random_sample(3).tolist() == numpys.random_sample(3).tolist()


def test_without_compiled_code_everything_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled() -> list[int]:
        numbers = np.arange(300, dtype=np.int32)
        native.shuffle(np.random.RandomState(7), numbers)
        return numbers.tolist()

    def results() -> list[list[int]]:
        counts = [0, 0]
        rows = np.zeros((2, 2, 3), dtype=np.int64)
        stored = np.arange(9, dtype=np.uint16)
        pieces = np.array([[2, 0, 0, 4], [0, 1, 1, 3]]).T
        range_ = native.split(stored, *pieces, rows[0], rows[1])
        sizes = np.array([2, 0, 5], dtype=np.int32)
        return [
            native.greedy_choices([0.7, 0.3], counts, 0, 9).tolist(),
            counts,
            KeyedPermutation(100, seed=1, epoch=0).of(np.arange(9)).tolist(),
            rows.reshape(-1).tolist(),
            list(range_),
            shuffled(),
            native.sample_index(sizes, np.array([2, 1, 0], dtype=np.int32), 3, 2).tolist(),
        ]

    compiled = results()
    monkeypatch.setattr(native, "_library", None)
    assert results() == compiled
