"""The compiled helpers of csrc/data: what runs once per sample or per token, and the same in numpy where it must.

Each function here says what it computes; which of the two computes it changes the speed and nothing else. While
compiled code runs, other threads of Python do too.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_DTYPE_CODES = {np.dtype(name): code for code, name in {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}.items()}
_SIGNATURES = {
    "greedy_choices": "ppnnnp",
    "permute": "pnnnpnp",
    "split": "cpppppnnppp",
    "sample_index": "ppnnnp",
    "shuffle": "pppnn",
}
_HIGHEST = np.iinfo(np.int64).max
_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "c": ctypes.c_int}


def load() -> ctypes.CDLL | None:
    """The compiled helpers; None where they were not built or do not load."""
    if sys.byteorder != "little":
        return None  # tokens are stored in little-endian order
    paths = [Path(__file__).with_name(f"_order{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
        for name, letters in _SIGNATURES.items():
            function = getattr(library, f"megatron_{name}")
            function.argtypes = [_TYPES[letter] for letter in letters]
            function.restype = ctypes.c_int
    except (OSError, AttributeError):
        return None
    return library


_library = load()


def greedy_choices(weights: Sequence[float], counts: list[int], start: int, stop: int) -> NDArray[np.int16]:
    """The member of a blend at each position `start … stop`: the one with the largest w·max(i, 1) − count, the first of
    equals. `counts`, what each has given before, is brought up to date. In double arithmetic, as Megatron computes it,
    so that ties and near-ties fall alike."""
    if _library is None:
        return greedy_choices_in_python(weights, counts, start, stop)
    shares, given = np.asarray(weights, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    choices = np.empty(stop - start, dtype=np.int16)
    _library.megatron_greedy_choices(_address(shares), _address(given), len(given), start, stop, _address(choices))
    counts[:] = given.astype(np.int64).tolist()
    return choices


def greedy_choices_in_python(weights: Sequence[float], counts: list[int], start: int, stop: int) -> NDArray[np.int16]:
    """`greedy_choices` without compiled code: about a microsecond for each position and member."""
    choices = np.empty(stop - start, dtype=np.int16)
    given = [float(count) for count in counts]
    for at, position in enumerate(range(start, stop)):
        scale = float(max(position, 1))
        best, lag = 0, weights[0] * scale - given[0]
        for member in range(1, len(given)):
            other = weights[member] * scale - given[member]
            if other > lag:
                best, lag = member, other
        choices[at] = best
        given[best] += 1.0
    counts[:] = [int(count) for count in given]
    return choices


def permute(keys: NDArray[np.uint64], half_bits: int, size: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the keyed permutation of 0 … size − 1 sends each index: see `megatron.data.order.KeyedPermutation`."""
    if _library is None:
        return permute_in_numpy(keys, half_bits, size, indices)
    indices = np.ascontiguousarray(indices, dtype=np.int64)
    permuted = np.empty_like(indices)
    _library.megatron_permute(
        _address(keys), len(keys), half_bits, size, _address(indices), len(indices), _address(permuted)
    )
    return permuted


def permute_in_numpy(
    keys: NDArray[np.uint64], half_bits: int, size: int, indices: NDArray[np.int64]
) -> NDArray[np.int64]:
    """`permute` without compiled code."""
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    values = indices.astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        left, right = values[walking] >> half, values[walking] & mask
        for key in keys:
            mixed = right * np.uint64(0x9E3779B97F4A7C15) + key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        values[walking] = (left << half) | right
        walking = walking[values[walking] >= np.uint64(size)]
    return values.astype(np.int64)


def split(
    stored: NDArray[np.integer],
    starts: NDArray[np.int64],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    lengths: NDArray[np.int64],
    tokens: NDArray[np.int64],
    labels: NDArray[np.int64],
) -> tuple[int, int]:
    """Copy pieces of a token stream into `tokens` and `labels` i64[n, s], each label being the token behind its input.

    Piece k is `lengths[k]` tokens from `starts[k]` on, and begins at column `columns[k]` of row `rows[k]`; a row has
    s + 1 tokens, of which the first is no label and the last a label alone. Returns the lowest and the highest token
    (0 and −1 where there is none). Pieces must lie within both.
    """
    assert tokens.flags.c_contiguous and labels.flags.c_contiguous and tokens.shape == labels.shape
    assert tokens.dtype == labels.dtype == np.int64
    if len(starts) == 0:
        return 0, -1
    count, width = tokens.shape
    assert lengths.min() >= 0 and starts.min() >= 0 and int((starts + lengths).max()) <= len(stored)
    assert rows.min() >= 0 and rows.max() < count
    assert columns.min() >= 0 and int((columns + lengths).max()) <= width + 1
    if _library is None or not stored.flags.c_contiguous:
        return split_in_numpy(stored, starts, rows, columns, lengths, tokens, labels)
    pieces = [np.ascontiguousarray(array, dtype=np.int64) for array in (starts, rows, columns, lengths)]
    found = np.array([_HIGHEST, -_HIGHEST], dtype=np.int64)
    status = _library.megatron_split(
        _DTYPE_CODES[stored.dtype], _address(stored), *map(_address, pieces), len(starts), width,
        _address(tokens), _address(labels), _address(found),
    )  # fmt: skip
    assert status == 0, stored.dtype
    low, high = found.tolist()
    return (low, high) if low <= high else (0, -1)


def split_in_numpy(
    stored: NDArray[np.integer],
    starts: NDArray[np.int64],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    lengths: NDArray[np.int64],
    tokens: NDArray[np.int64],
    labels: NDArray[np.int64],
) -> tuple[int, int]:
    """`split` without compiled code."""
    width, low, high = tokens.shape[1], _HIGHEST, -_HIGHEST
    pieces = zip(starts.tolist(), rows.tolist(), columns.tolist(), lengths.tolist(), strict=True)
    for start, row, column, length in pieces:
        if length:
            run = stored[start : start + length]
            low, high = min(low, int(run.min())), max(high, int(run.max()))
            tokens[row, column : column + length] = run[: width - column]
            first = 1 if column == 0 else 0
            labels[row, column - 1 + first : column - 1 + length] = run[first:]
    return (low, high) if low <= high else (0, -1)


def sample_index(
    sizes: NDArray[np.int32], documents: NDArray[np.int32], sequence_length: int, total: int
) -> NDArray[np.int64]:
    """(entry of `documents`, offset) of token j x sequence_length of the joined documents, for j = 0 … total: i64
    [total + 1, 2]. Of entries that start at the same token it is the one that is not empty; token 0 is in the first."""
    if _library is None:
        return sample_index_in_numpy(sizes, documents, sequence_length, total)
    # Those of an index file are not aligned.
    sizes, documents = (np.require(array, np.int32, ("C", "A")) for array in (sizes, documents))
    index = np.empty((total + 1, 2), dtype=np.int64)
    _library.megatron_sample_index(
        _address(sizes), _address(documents), len(documents), sequence_length, total, _address(index)
    )
    return index


def sample_index_in_numpy(
    sizes: NDArray[np.int32], documents: NDArray[np.int32], sequence_length: int, total: int
) -> NDArray[np.int64]:
    """`sample_index` without compiled code."""
    starts = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum(sizes[documents], dtype=np.int64, out=starts[1:])
    positions = np.arange(total + 1, dtype=np.int64) * sequence_length
    entries = np.searchsorted(starts, positions, side="right") - 1
    offsets = positions - starts[entries]
    entries[0] = 0  # Megatron starts at the first entry even if that document is empty
    return np.stack((entries, offsets), axis=1)


def shuffle(generator: np.random.RandomState, numbers: NDArray[np.integer]) -> None:
    """`generator.shuffle(numbers)`, from which it differs in speed alone, later draws included."""
    state = generator.get_state(legacy=False)
    assert isinstance(state, dict)
    possible = numbers.ndim == 1 and numbers.flags.c_contiguous and numbers.itemsize in (4, 8)
    if _library is None or state["bit_generator"] != "MT19937" or not possible or len(numbers) > 2**32:
        generator.shuffle(numbers)
        return
    key = np.array(state["state"]["key"], dtype=np.uint32)
    position = np.array([state["state"]["pos"]], dtype=np.int64)
    status = _library.megatron_shuffle(
        _address(key), _address(position), _address(numbers), numbers.itemsize, len(numbers)
    )
    assert status == 0, (numbers.dtype, len(numbers))
    state["state"] = {"key": key, "pos": int(position[0])}
    generator.set_state(state)


def _address(array: NDArray[np.generic]) -> int:
    return int(array.__array_interface__["data"][0])  # `array.ctypes` takes several microseconds
