"""What is read of a `tokenizer.model`, against the library's word and against messages laid out in other ways."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import sentencepiece

from megatron.tokenizer.model_file import ModelFile, Piece, PieceKind
from tests.tokenizer.conftest import train_sentencepiece


def field(number: int, value: bytes | int | float) -> bytes:
    """A field of a Protocol Buffers message."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    parts = [value & 0x7F]
    while value := value >> 7:
        parts[-1] |= 0x80
        parts.append(value & 0x7F)
    return bytes(parts)


def test_pieces_are_read_however_they_are_laid_out() -> None:
    long = "x" * 300
    messages = {
        field(1, b"a") + field(2, -1.5): Piece("a", -1.5, PieceKind.NORMAL),
        field(1, b"b") + field(2, -2.0) + field(3, 4): Piece("b", -2.0, PieceKind.USER_DEFINED),
        field(2, -3.0) + field(1, "é".encode()): Piece("é", -3.0, PieceKind.NORMAL),
        field(3, 3) + field(1, b"<s>"): Piece("<s>", 0.0, PieceKind.CONTROL),
        field(1, long.encode()) + field(2, 7.0): Piece(long, 7.0, PieceKind.NORMAL),
        field(1, b"c"): Piece("c", 0.0, PieceKind.NORMAL),
        field(1, b"d") + field(200, b"later") + field(201, 3) + field(2, 1.0): Piece("d", 1.0, PieceKind.NORMAL),
        b"": Piece("", 0.0, PieceKind.NORMAL),
    }
    content = b"".join(field(1, message) for message in messages)
    assert ModelFile.parse(content).pieces == tuple(messages.values())


def test_options_have_the_formats_defaults() -> None:
    model = ModelFile.parse(b"")
    assert (model.adds_leading_space, model.removes_extra_spaces, model.marks_spaces) == (True, True, True)
    assert not (model.is_bpe or model.byte_fallback or model.space_as_suffix or model.has_character_map)


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({}, "is_bpe", True),
        ({"model_type": "unigram", "vocab_size": 290}, "is_bpe", False),
        ({}, "byte_fallback", True),
        ({"byte_fallback": False, "vocab_size": 60}, "byte_fallback", False),
        ({}, "has_character_map", False),
        ({"normalization_rule_name": "nmt_nfkc"}, "has_character_map", True),
        ({}, "removes_extra_spaces", False),
        ({"remove_extra_whitespaces": True}, "removes_extra_spaces", True),
        ({"add_dummy_prefix": False}, "adds_leading_space", False),
        ({"treat_whitespace_as_suffix": True}, "space_as_suffix", True),
    ],
)
def test_options_are_those_a_model_was_trained_with(options: dict[str, object], name: str, value: bool) -> None:
    assert getattr(ModelFile.parse(train_sentencepiece(**options)), name) is value


def test_a_real_models_pieces_are_those_of_the_library(shared: Path) -> None:
    content = (shared / "data/tokenizers/mistral_v1_tokenizer.model").read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    ids = list(range(processor.get_piece_size()))
    model = ModelFile.parse(content)
    assert [piece.text for piece in model.pieces] == processor.id_to_piece(ids)
    assert [piece.score for piece in model.pieces] == processor.get_score(ids)
    for kind, library in (
        (PieceKind.CONTROL, processor.is_control),
        (PieceKind.BYTE, processor.is_byte),
        (PieceKind.UNKNOWN, processor.is_unknown),
        (PieceKind.UNUSED, processor.is_unused),
    ):
        assert set(model.of_kind(kind).values()) == {identity for identity in ids if library(identity)}
