"""What a `tokenizer.model` says of itself: its pieces and the options that decide how a text becomes pieces.

The file is a Protocol Buffers message, of which this reads the few fields that matter here (sentencepiece_model.proto).
The library reads the whole, but tells neither the kind of model nor how it normalizes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

_SCORE = struct.Struct("<f")


class PieceKind(IntEnum):
    """ModelProto.SentencePiece.Type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """A piece with its score; its id is its place in the model."""

    text: str
    score: float
    kind: PieceKind


@dataclass(frozen=True)
class ModelFile:
    """The pieces of a model in the order of their ids, and its options with their defaults filled in."""

    pieces: tuple[Piece, ...]
    is_bpe: bool
    byte_fallback: bool
    space_as_suffix: bool
    has_character_map: bool
    adds_leading_space: bool
    removes_extra_spaces: bool
    marks_spaces: bool

    @classmethod
    def parse(cls, content: bytes) -> ModelFile:
        """Read a file that the library has accepted."""
        pieces: list[Piece] = []
        trainer: dict[int, int | bytes] = {}
        normalizer: dict[int, int | bytes] = {}
        at = _usual_pieces(content, 0, pieces)
        while at < len(content):
            number, value, at = _field(content, at)
            if number == 1:
                pieces.append(_piece(_as_bytes(value)))
            elif number == 2:
                trainer.update(_fields(_as_bytes(value)))
            elif number == 3:
                normalizer.update(_fields(_as_bytes(value)))
            at = _usual_pieces(content, at, pieces)
        return cls(
            pieces=tuple(pieces),
            is_bpe=trainer.get(3, 1) == 2,
            byte_fallback=bool(trainer.get(35, 0)),
            space_as_suffix=bool(trainer.get(24, 0)),
            has_character_map=bool(normalizer.get(2, b"")),
            adds_leading_space=bool(normalizer.get(3, 1)),
            removes_extra_spaces=bool(normalizer.get(4, 1)),
            marks_spaces=bool(normalizer.get(5, 1)),
        )

    def of_kind(self, kind: PieceKind) -> dict[str, int]:
        """The pieces of one kind with their ids."""
        return self._by_kind[kind]

    @cached_property
    def _by_kind(self) -> dict[PieceKind, dict[str, int]]:
        found: dict[PieceKind, dict[str, int]] = {kind: {} for kind in PieceKind}
        for identity, (text, _, kind) in enumerate(self.pieces):
            found[kind][text] = identity
        return found


def _usual_pieces(content: bytes, at: int, pieces: list[Piece]) -> int:
    """Append the pieces from `at` on that are laid out as nearly all are; returns where the first other field begins.

    Each is a field 1 that holds a short text (field 1) and a score (field 2) and no more. A model has so many that
    reading them field by field takes longer than anything else at a start.
    """
    normal, decode_score = PieceKind.NORMAL, _SCORE.unpack_from
    while at + 2 < len(content) and content[at] == content[at + 2] == 0x0A:
        length = content[at + 1]
        end = at + 2 + length
        if not 7 <= length < 0x80 or end > len(content) or content[at + 3] != length - 7 or content[end - 5] != 0x15:
            break
        pieces.append(Piece(content[at + 4 : end - 5].decode("utf-8"), decode_score(content, end - 4)[0], normal))
        at = end
    return at


def _piece(content: bytes) -> Piece:
    fields = dict(_fields(content))
    score: float = _SCORE.unpack(_as_bytes(fields.get(2, bytes(4))))[0]
    return Piece(_as_bytes(fields.get(1, b"")).decode("utf-8"), score, PieceKind(int(fields.get(3, 1))))


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field."""
    at = 0
    while at < len(content):
        number, value, at = _field(content, at)
        yield number, value


def _field(content: bytes, at: int) -> tuple[int, int | bytes, int]:
    """Number and value (a whole number as such, everything else as bytes) of the field at `at`, and where it ends."""
    key, at = _varint(content, at)
    wire = key & 7
    if wire == 0:
        value, at = _varint(content, at)
        return key >> 3, value, at
    length = {1: 8, 5: 4}.get(wire, 0)
    if wire == 2:
        length, at = _varint(content, at)
    return key >> 3, content[at : at + length], at + length


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A whole number of seven bits to the byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _as_bytes(value: int | bytes) -> bytes:
    assert isinstance(value, bytes), "a field of another type than in the format"
    return value
