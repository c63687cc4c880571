"""Conversations on disk: Megatron-LLM's `PREFIX-text` and `PREFIX-role`, two `.bin/.idx` pairs alike token for token.

A sequence is one conversation; the second pair holds the role of the speaker of each token. This module owns their
names and every check on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.data import native
from megatron.data.indexed import IndexedReader, clean_prefix, dtype_for_vocabulary, pair_paths, require_pair
from megatron.utils.errors import DataError

_TEXT, _ROLE = "-text", "-role"
_ROLE_VOCABULARY = 16  # Megatron-LLM's, from which the dtype of the roles follows


class Role(IntEnum):
    """Who speaks. The loss is on the assistant's tokens."""

    SYSTEM = 0
    PROMPTER = 1
    ASSISTANT = 2


ROLE_DTYPE = dtype_for_vocabulary(_ROLE_VOCABULARY)


@dataclass(frozen=True)
class Filled:
    """Tokens, what follows each, and the role of that: i64, all of one length."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    roles: NDArray[np.int64]


def text_prefix(prefix: str) -> str:
    """The prefix of the pair of tokens."""
    return clean_prefix(prefix) + _TEXT


def role_prefix(prefix: str) -> str:
    """The prefix of the pair of roles."""
    return clean_prefix(prefix) + _ROLE


class ConversationPair:
    """The conversations of a prefix, checked when opened and mapped, not read.

    `sizes` i32[n] are their tokens. Raises DataError for files that are missing, damaged or do not belong together.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = clean_prefix(prefix)
        require_conversations(self.prefix)
        self._text, self._role = IndexedReader(text_prefix(prefix)), IndexedReader(role_prefix(prefix))
        self.sizes: NDArray[np.int32] = self._text.sizes
        self.num_tokens: int = self._text.num_tokens
        _check_alike(self._text, self._role)

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self.sizes)

    def read(self, sequence: int, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first `most` tokens of a conversation and their roles. Raises DataError for what is neither."""
        length = min(int(self.sizes[sequence]), most)
        tokens = self._text.read(sequence, 0, length).astype(np.int64)
        roles = self._role.read(sequence, 0, length).astype(np.int64)
        if length and tokens.min() < 0:
            raise DataError(
                f"{self.source(sequence)} holds the token {tokens.min()}; tokens are not negative, so the data are "
                "damaged: write them again with `megatron preprocess --chat`"
            )
        if length and not 0 <= roles.min() <= roles.max() <= max(Role):
            at = int(np.argmax((roles < 0) | (roles > max(Role))))
            known = ", ".join(f"{role.value} ({role.name.lower()})" for role in Role)
            raise DataError(
                f"{self._role.bin_path}, sequence {sequence}, token {at} has the role {roles[at]}; roles are {known}. "
                "Is it the role file of this text? Write both again with `megatron preprocess --chat`"
            )
        return tokens, roles

    def fill(
        self, sequences: NDArray[np.int64], inputs: NDArray[np.int64], at: NDArray[np.int64], out: Filled
    ) -> tuple[int, int, int, int]:
        """Of each of these conversations its first tokens, as many as `inputs` says, those that follow these, and the
        roles of the latter, into `out` from the places `at` on. There must be so many.

        The lowest and highest of the tokens, and those of the roles; 0 and -1 where there are none.
        """
        some = np.flatnonzero(inputs)
        lengths, at, rows = inputs[some], at[some], np.zeros(len(some), dtype=np.int64)
        begins = self._text.pointers.view(np.ndarray)[sequences[some]] // self._text.dtype.itemsize
        # Sequences lie back to back in both files, so they are at the same places.
        text, role = (one.read_stream(0, self.num_tokens).view(np.ndarray) for one in (self._text, self._role))
        unused = np.empty_like(out.tokens)[None]  # what `split` makes of the token behind each is of no use here
        low, high = native.split(text, begins, rows, at, lengths, out.tokens[None], unused)
        lower, higher = native.split(text, begins + 1, rows, at, lengths, out.labels[None], unused)
        return (
            min(low, lower),
            max(high, higher),
            *native.split(role, begins + 1, rows, at, lengths, out.roles[None], unused),
        )

    def source(self, sequence: int) -> str:
        """Where a conversation is, in words for an error message."""
        return f"{self._text.bin_path} (sequence {sequence})"


def holds_conversations(prefix: str) -> bool:
    """Whether a prefix is of conversations and not of a pair of tokens."""
    pair, text, role = _files(prefix)
    return bool(text and role and not pair)


def holds_roles(prefix: str) -> bool:
    """Whether a pair is that of the roles of conversations: its name says so, and that of their tokens is there too."""
    clean = clean_prefix(prefix)
    return clean.endswith(_ROLE) and pair_paths(clean.removesuffix(_ROLE) + _TEXT)[1].is_file()


def require_no_conversations(prefix: str) -> None:
    """Raise DataError where a prefix is not of a pair of tokens but of conversations."""
    if holds_conversations(prefix):
        _, text, role = _files(prefix)
        raise DataError(
            f"{prefix} is of conversations ({text[0].name}, {role[0].name}): data.kind=pretraining reads a pair of "
            "tokens; use data.kind=instruction for these"
        )


def require_conversations(prefix: str) -> None:
    """Raise DataError, saying what is there instead, unless all files of conversations exist."""
    pair, text, role = _files(prefix)
    if pair and not text and not role:
        raise DataError(
            f"{prefix} is a pair of plain token data: data.kind=instruction reads {text_prefix(prefix)} and "
            f"{role_prefix(prefix)}, which `megatron preprocess --chat` writes; use data.kind=pretraining for this pair"
        )
    for one in _both(prefix):
        require_pair(one)


def _files(prefix: str) -> list[list[Path]]:
    """The files that there are: of the prefix itself, of its tokens, of its roles."""
    return [[path for path in pair_paths(one) if path.is_file()] for one in (prefix, *_both(prefix))]


def _both(prefix: str) -> tuple[str, str]:
    return text_prefix(prefix), role_prefix(prefix)


def _check_alike(text: IndexedReader, role: IndexedReader) -> None:
    """Check that every sequence has as many roles as tokens."""
    remedy = "they are not of the same conversations: write both again with `megatron preprocess --chat`"
    if len(text) != len(role):
        raise DataError(
            f"{text.idx_path} has {len(text):,} sequences, but {role.idx_path.name} has {len(role):,}; {remedy}"
        )
    if len(text) and not np.array_equal(text.sizes, role.sizes):
        at = int(np.argmax(text.sizes != role.sizes))
        raise DataError(
            f"{text.idx_path}: sequence {at} has {text.sizes[at]:,} tokens, but {role.sizes[at]:,} roles in "
            f"{role.idx_path.name}; {remedy}"
        )
