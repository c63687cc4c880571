"""Where a long text may be cut so that its parts, encoded one by one, give the ids of the whole.

Libraries hold some hundred bytes for each character of a text that they encode. Cut into parts, a line of any length
takes no more memory than its text and its ids. A cut is allowed only where no piece of the vocabulary can lie across
it, so that nothing on one side bears on the other; a text without such a place stays whole.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Protocol

from megatron.tokenizer.forms import SPACE_MARK

PART_CHARACTERS = 1 << 16
_SEARCHED_CHARACTERS = 1 << 12
Part = tuple[str, int]  # a text, and how many of its first ids are to be left out

_SPACES = " " + SPACE_MARK


class Cutter(Protocol):
    """Cuts texts for one tokenizer."""

    def parts(self, text: str) -> Iterator[Part]:
        """The parts of a text in order, each of at least `PART_CHARACTERS` but for the last."""
        ...


class MarkedSpaceCutter:
    """For tokenizers that put a space mark before a text and in place of each space, as SentencePiece does.

    A space between two other characters may be left out where the text is cut, since the mark before the second part
    stands for it. Elsewhere that mark is one id of its own if no piece holds it together with the next character: it
    is left out then.
    """

    def __init__(self, pieces: Iterable[str], part_characters: int = PART_CHARACTERS) -> None:
        pairs: set[tuple[str, str]] = set()
        for piece in pieces:
            pairs.update(itertools.pairwise(piece))
        self._pairs = pairs
        self._part_characters = part_characters
        self._cuts_at_spaces = not any(second == SPACE_MARK and first != SPACE_MARK for first, second in pairs)

    def parts(self, text: str) -> Iterator[Part]:
        begin = leave_out = 0
        for at in self._cuts(text):
            yield text[begin:at], leave_out
            at_space = text[at] == " "
            begin, leave_out = at + at_space, not at_space
        yield text[begin:], leave_out

    def _cuts(self, text: str) -> Iterator[int]:
        at = self._part_characters
        while at < len(text) - 1:
            # Where there is no cut for so long, there hardly is one soon: most of such a text is not looked at.
            end = min(at + min(self._part_characters, _SEARCHED_CHARACTERS), len(text) - 1)
            cut = next((at for at in range(at, end) if self._is_cut(text[at - 1], text[at], text[at + 1])), None)
            if cut is not None:
                yield cut
            at = (end if cut is None else cut) + self._part_characters

    def _is_cut(self, before: str, first: str, second: str) -> bool:
        if before in _SPACES:
            return False
        if first == " ":
            return self._cuts_at_spaces and second not in _SPACES
        return first != SPACE_MARK and (before, first) not in self._pairs and (SPACE_MARK, first) not in self._pairs


class WordCutter:
    """For byte-level tokenizers that split a text into words, each with the space before it, before they encode."""

    _CUT = re.compile(r"[A-Za-z](?= [A-Za-z])")

    def __init__(self, part_characters: int = PART_CHARACTERS) -> None:
        self._part_characters = part_characters

    def parts(self, text: str) -> Iterator[Part]:
        begin = 0
        while cut := self._CUT.search(text, begin + self._part_characters):
            yield text[begin : cut.end()], 0
            begin = cut.end()
        yield text[begin:], 0
