"""A chunk of JSON lines to tokens. This module must not know in which process it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import dtype_for_vocabulary
from megatron.data.instruction.encode import ChatEncoding, encode_conversations
from megatron.data.instruction.pair import ROLE_DTYPE
from megatron.data.jsonl import BadLine, Chunk, parse_chunk
from megatron.tokenizer import SpecialTokens, Tokenizer


@dataclass(frozen=True)
class Encoding:
    """How lines become tokens; unless None, `bos_id` precedes each document and `eod_id` is appended to it.

    `special_tokens` says what a control token such as `</s>` that is written out in a text becomes: text, or its id.
    With `chat`, lines are conversations, and there are two columns: their tokens and the roles of these.
    """

    tokenizer: Path
    extra_tokens: tuple[str, ...]
    json_keys: tuple[str, ...]
    eod_id: int | None
    bos_id: int | None = None
    special_tokens: SpecialTokens = "text"
    chat: ChatEncoding | None = None

    def dtypes(self, vocab_size: int) -> tuple[np.dtype, ...]:
        """Of each column that is written, the dtype, given the tokenizer's number of tokens."""
        tokens = dtype_for_vocabulary(vocab_size)
        return (tokens,) * len(self.json_keys) if self.chat is None else (tokens, ROLE_DTYPE)


@dataclass(frozen=True)
class Encoded:
    """A chunk's documents: per JSON key (or column of conversations), their tokens back to back and their sizes
    i64[documents], none of them empty.

    `num_texts` counts the texts read per key, those without tokens included; `num_lines` all lines. `without_document`
    has, per key, the places (from 0) of the lines that gave no document: blank, bad, or of a text without tokens.
    """

    num_lines: int
    num_texts: int
    documents: tuple[tuple[NDArray[np.integer], NDArray[np.int64]], ...]
    without_document: tuple[NDArray[np.int64], ...]
    bad: tuple[BadLine, ...]


def encode_chunk(tokenizer: Tokenizer, encoding: Encoding, chunk: Chunk) -> Encoded:
    """The tokens of a chunk, in the dtypes for the vocabulary, and its bad lines."""
    if encoding.chat is not None:
        return _encode_conversations(tokenizer, encoding.chat, encoding.dtypes(tokenizer.vocab_size), chunk)
    parsed = parse_chunk(chunk, encoding.json_keys)
    places = np.array(parsed.places, dtype=np.int64)
    columns = [_encode_column(tokenizer, encoding, texts) for texts in parsed.texts]
    return Encoded(
        num_lines=parsed.num_lines,
        num_texts=len(places),
        documents=tuple((tokens, sizes[sizes > 0]) for tokens, sizes in columns),
        without_document=tuple(_others(places[sizes > 0], parsed.num_lines) for _, sizes in columns),
        bad=tuple(parsed.bad),
    )


def _encode_conversations(
    tokenizer: Tokenizer, chat: ChatEncoding, dtypes: Sequence[np.dtype], chunk: Chunk
) -> Encoded:
    conversations, places, num_lines, bad = encode_conversations(tokenizer, chat, chunk)
    sizes = np.array([len(tokens) for tokens, _ in conversations], dtype=np.int64)
    columns = [
        np.concatenate(
            [np.empty(0, dtype), *(conversation[column] for conversation in conversations)],
            dtype=dtype,
            casting="unsafe",
        )
        for column, dtype in enumerate(dtypes)
    ]
    others = _others(np.array(places, dtype=np.int64), num_lines)
    return Encoded(
        num_lines=num_lines,
        num_texts=len(conversations),
        documents=tuple((column, sizes) for column in columns),
        without_document=(others,) * len(columns),
        bad=tuple(bad),
    )


def _encode_column(
    tokenizer: Tokenizer, encoding: Encoding, texts: Sequence[str]
) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """The tokens of the texts back to back, and the size of each, 0 where a text has none."""
    dtype = dtype_for_vocabulary(tokenizer.vocab_size)
    tokens, sizes = tokenizer.encode_batch(texts, dtype, encoding.special_tokens)
    ends, full = np.cumsum(sizes), sizes > 0
    places = [(ends - sizes, encoding.bos_id), (ends, encoding.eod_id)]
    added = [(where[full], identity) for where, identity in places if identity is not None]
    if added:
        # Where a document ends and the next begins, its end is to come first: given first, it stays first.
        at = np.concatenate([where for where, _ in reversed(added)])
        values = np.repeat([identity for _, identity in reversed(added)], np.count_nonzero(full)).astype(dtype)
        tokens = np.insert(tokens, at, values)
    return tokens, sizes + len(added) * full


def _others(places: NDArray[np.int64], num_lines: int) -> NDArray[np.int64]:
    """The numbers below `num_lines` that are not among `places`."""
    other = np.ones(num_lines, dtype=bool)
    other[places] = False
    return np.flatnonzero(other)


def encode_here(chunks: Iterable[Chunk], tokenizer: Tokenizer, encoding: Encoding) -> Iterator[Encoded]:
    """Encode chunks in this process."""
    for chunk in chunks:
        yield encode_chunk(tokenizer, encoding, chunk)
