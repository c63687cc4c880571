"""The two files of conversations: what is read, and what is said of files that do not fit each other."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import IndexedWriter
from megatron.data.instruction.pair import ConversationPair, require_no_conversations, role_prefix, text_prefix
from megatron.utils.errors import DataError

from .conftest import MakeConversations, write_conversations


def megatron_llms_bytes(sequences: list[list[int]]) -> tuple[bytes, bytes]:
    """(.bin, .idx) as Megatron-LLM leaves them, which never closes a document: byte by byte from the format."""
    tokens = struct.pack(f"<{sum(map(len, sequences))}H", *[token for sequence in sequences for token in sequence])
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(sequences), 1)
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    offset = 0
    for sequence in sequences:
        index += struct.pack("<q", offset)
        offset += 2 * len(sequence)
    return tokens, index + struct.pack("<q", 0)


TEXT = [[5, 6, 7, 8, 9], [], [65535, 1], [3]]
ROLES = [[0, 0, 1, 2, 2], [], [1, 2], [1]]


def test_megatron_llms_files_are_read(tmp_path: Path) -> None:
    for name, sequences in (("orca-text", TEXT), ("orca-role", ROLES)):
        tokens, index = megatron_llms_bytes(sequences)
        (tmp_path / f"{name}.bin").write_bytes(tokens)
        (tmp_path / f"{name}.idx").write_bytes(index)
    pair = ConversationPair(str(tmp_path / "orca"))
    assert len(pair) == 4 and pair.sizes.tolist() == [5, 0, 2, 1] and pair.num_tokens == 8
    for number in range(4):
        tokens, roles = pair.read(number, 100)
        assert tokens.tolist() == TEXT[number] and roles.tolist() == ROLES[number]
        assert tokens.dtype == roles.dtype == np.int64
    tokens, roles = pair.read(0, 3)
    assert tokens.tolist() == [5, 6, 7] and roles.tolist() == [0, 0, 1]


def test_what_is_written_is_megatron_llms_but_for_the_documents_it_leaves_out(tmp_path: Path) -> None:
    """The .bin files byte for byte, and the .idx up to the document index, which Megatron-LLM does not look at here."""
    write_conversations(str(tmp_path / "orca"), list(zip(TEXT, ROLES, strict=True)))
    for name, sequences in (("orca-text", TEXT), ("orca-role", ROLES)):
        tokens, index = megatron_llms_bytes(sequences)
        assert (tmp_path / f"{name}.bin").read_bytes() == tokens
        found = (tmp_path / f"{name}.idx").read_bytes()
        count_at, documents_at = 26, len(index) - 8
        assert found[:count_at] == index[:count_at]
        assert found[count_at + 8 : documents_at] == index[count_at + 8 : documents_at]
        assert found[documents_at:] == struct.pack("<5q", 0, 1, 2, 3, 4)


def test_files_of_other_conversations_are_refused(tmp_path: Path, make_conversations: MakeConversations) -> None:
    prefix = make_conversations([([1, 2, 3], [1, 1, 2]), ([4, 5], [1, 2])])
    make_conversations([([1, 2, 3], [1, 1, 2])], "one")
    make_conversations([([1, 2, 3], [1, 1, 2]), ([4, 5, 6], [1, 2, 2])], "longer")

    def swap(other: str) -> None:
        for ending in (".bin", ".idx"):
            source = Path(role_prefix(str(tmp_path / other)) + ending)
            Path(role_prefix(prefix) + ending).write_bytes(source.read_bytes())

    swap("one")
    with pytest.raises(DataError, match=r"orca-text.idx has 2 sequences, but orca-role.idx has 1.*write both again"):
        ConversationPair(prefix)
    swap("longer")
    with pytest.raises(DataError, match=r"sequence 1 has 2 tokens, but 3 roles in orca-role.idx.*preprocess --chat"):
        ConversationPair(prefix)


def test_a_role_that_is_none_is_named(make_conversations: MakeConversations) -> None:
    pair = ConversationPair(make_conversations([([1, 2], [1, 2]), ([3, 4, 5], [1, 3, 2])]))
    assert pair.read(0, 9)[1].tolist() == [1, 2] and pair.read(1, 1)[1].tolist() == [1]
    with pytest.raises(
        DataError, match=r"orca-role.bin, sequence 1, token 1 has the role 3; roles are 0 \(system\), 1 \(prompter\), 2"
    ):
        pair.read(1, 9)


def test_negative_tokens_are_damage(tmp_path: Path) -> None:
    for name, tokens in ((text_prefix(str(tmp_path / "orca")), [1, -7]), (role_prefix(str(tmp_path / "orca")), [1, 2])):
        with IndexedWriter(name, "<i4") as writer:
            writer.add_sequence(tokens)
            writer.end_document()
    with pytest.raises(DataError, match=r"orca-text.bin \(sequence 0\) holds the token -7"):
        ConversationPair(str(tmp_path / "orca")).read(0, 9)


def test_other_files_are_told_apart(tmp_path: Path, make_conversations: MakeConversations) -> None:
    with IndexedWriter(tmp_path / "plain", "<u2") as writer:
        writer.add_sequence([1, 2])
        writer.end_document()
    with pytest.raises(DataError, match=r"plain is a pair of plain token data.*data.kind=pretraining"):
        ConversationPair(str(tmp_path / "plain"))
    prefix = make_conversations([([1, 2], [1, 2])])
    with pytest.raises(DataError, match=r"orca is of conversations \(orca-text.bin, orca-role.bin\).*data.kind=instr"):
        require_no_conversations(prefix)
    require_no_conversations(str(tmp_path / "plain"))
    Path(role_prefix(prefix) + ".idx").unlink()
    with pytest.raises(DataError, match=r"orca-role.idx is missing, though orca-role.bin is there"):
        ConversationPair(prefix)
    with pytest.raises(DataError, match=r"no token data at .*nowhere-text"):
        ConversationPair(str(tmp_path / "nowhere"))
