"""Long texts without a place to cut (cuts.py), such as a word of a million letters: encoded in parts that overlap.

Byte pair encoding always joins the pair of neighbours that ranks first, the leftmost of equals. So a sequence of pieces
is what it makes of a text if and only if, of each two neighbours, it makes of their text alone just these two: for as
long as no join crosses a border between two pieces, what happens between the borders around both is what happens to
their text alone, and the first join that crosses a border would cross it there too. Therefore, where the encodings of
two overlapping parts share a piece at the same place, one up to it and the other from it on are the encoding of both:
each two neighbours are neighbours in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

PART_CHARACTERS = 1 << 13
_SHARED_PIECES = 64  # of a part's end, which the next part has too, at first
_TRIAL_CHARACTERS = 24
_TRIALS = [*(letter * 200 for letter in "ae 0\n-.é日"), "ab" * 99, " a" * 99, "the patient's 37.5 °C, and  so on; " * 9]

Ids = Sequence[int] | NDArray[np.integer]
Encode = Callable[[str], Ids]


@dataclass(frozen=True)
class _Run:
    """Pieces, and where in the text each of them ends."""

    ids: NDArray[np.integer]
    ends: NDArray[np.int64]


class Joiner:
    """Encodes long texts for a byte pair encoding that puts a space mark before a text and in place of each space, and
    writes characters that are no piece in bytes.

    `texts` are the pieces of text by their ids, `bytes_of` the ids that stand for a byte, with it.
    """

    def __init__(self, texts: Mapping[int, str], bytes_of: Mapping[int, int]) -> None:
        # In characters; of one that is written in bytes, the first counts.
        self._lengths = np.zeros(1 + max([*texts, *bytes_of]), dtype=np.int64)
        self._can_join = np.zeros(len(self._lengths), dtype=bool)
        for identity, text in texts.items():
            self._lengths[identity], self._can_join[identity] = len(text), True
        for identity, byte in bytes_of.items():
            self._lengths[identity], self._can_join[identity] = not 0x80 <= byte < 0xC0, byte < 0x80
        used = set[str]().union(*texts.values())
        # Before a text, it keeps the mark away: no piece holds it together with what follows.
        self._apart = next((chr(code) for code in range(1, 0x20) if chr(code) not in used), None)

    def is_exact(self, encode: Encode) -> bool:
        """Whether it gives the ids that `encode` gives of some texts, each as a whole."""
        if self._apart is None:
            return False
        return all(
            np.array_equal(np.concatenate(self.encode(text, encode, np.int64, _TRIAL_CHARACTERS)), encode(text))
            for text in _TRIALS
        )

    def encode(
        self, text: str, encode: Encode, dtype: DTypeLike, part_characters: int = PART_CHARACTERS
    ) -> list[NDArray[np.integer]]:
        """The ids that `encode` gives of a text, in runs of `dtype`; it is asked for parts of the text only, unless
        these share no piece however long they are."""
        size = part_characters
        while (runs := self._encode_in_parts(text, encode, dtype, size)) is None:
            size *= 4
        return runs

    def _encode_in_parts(
        self, text: str, encode: Encode, dtype: DTypeLike, size: int
    ) -> list[NDArray[np.integer]] | None:
        """The runs of ids, None where two parts share no piece. Each piece but the first and its neighbour before it
        are neighbours in the encoding of a part."""
        runs = []
        current, reached = self._run(text, 0, size, encode), size
        while reached < len(text):
            joint, shared = None, min(_SHARED_PIECES, 1 + len(current.ids) // 8)
            while joint is None:
                first = max(1, len(current.ids) - shared)
                if len(current.ids) < 2 or (start := int(current.ends[first - 1])) + size <= reached:
                    return None
                following = self._run(text, start, size, encode)
                joint = self._shared_piece(current, first, following)
                if joint is None and first == 1:
                    return None
                shared *= 4
            here, there = joint
            runs.append(current.ids[: here + 1].astype(dtype))
            current, reached = _Run(following.ids[there + 1 :], following.ends[there + 1 :]), start + size
        return [*runs, current.ids.astype(dtype)]

    def _run(self, text: str, begin: int, size: int, encode: Encode) -> _Run:
        """The pieces of a part; at the beginning of the text with the mark before it."""
        assert self._apart is not None
        if begin == 0:
            ids = np.asarray(encode(text[:size]))
            return _Run(ids, np.cumsum(self._lengths[ids]) - 1)
        ids = np.asarray(encode(self._apart + text[begin : begin + size]))[len(encode(self._apart)) :]
        return _Run(ids, begin + np.cumsum(self._lengths[ids]))

    def _shared_piece(self, current: _Run, first: int, following: _Run) -> tuple[int, int] | None:
        """The places in both of the first piece, from `first` on, that both have at the same place of the text."""
        here = first + np.flatnonzero(self._can_join[current.ids[first:]])
        there = np.flatnonzero(self._can_join[following.ids])
        _, one, other = np.intersect1d(
            current.ends[here], following.ends[there], assume_unique=True, return_indices=True
        )
        same = np.flatnonzero(current.ids[here[one]] == following.ids[there[other]])
        return (int(here[one[same[0]]]), int(there[other[same[0]]])) if len(same) else None
