"""Small pairs of conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron.data.indexed import IndexedWriter
from megatron.data.instruction.pair import ROLE_DTYPE, role_prefix, text_prefix

Conversation = tuple[Sequence[int], Sequence[int]]  # tokens and their roles
MakeConversations = Callable[..., str]


def write_conversations(prefix: str, conversations: Sequence[Conversation]) -> None:
    for name, dtype, which in ((text_prefix(prefix), "<u2", 0), (role_prefix(prefix), ROLE_DTYPE, 1)):
        with IndexedWriter(name, dtype) as writer:
            for conversation in conversations:
                writer.add_sequence(conversation[which])
                writer.end_document()


@pytest.fixture
def make_conversations(tmp_path: Path) -> MakeConversations:
    """Write conversations and give the prefix."""

    def make(conversations: Sequence[Conversation], name: str = "orca") -> str:
        prefix = str(tmp_path / name)
        write_conversations(prefix, conversations)
        return prefix

    return make
