"""A chunk of JSON lines to tokens. This module must not know in which process it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import dtype_for_vocabulary
from megatron.data.jsonl import Chunk, parse_texts
from megatron.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoding:
    """How lines become tokens; `eod_id` is appended to each document unless None."""

    tokenizer: Path
    extra_tokens: tuple[str, ...]
    json_keys: tuple[str, ...]
    eod_id: int | None


@dataclass(frozen=True)
class Encoded:
    """A chunk's documents: per JSON key, their tokens back to back and their sizes i64[documents], none of them empty.

    `num_texts` counts the texts read per key, those without tokens included.
    """

    file: Path
    num_bytes: int
    num_texts: int
    documents: tuple[tuple[NDArray[np.integer], NDArray[np.int64]], ...]


def encode_chunk(tokenizer: Tokenizer, encoding: Encoding, chunk: Chunk) -> Encoded:
    """The tokens of a chunk, in the dtype for the vocabulary. Raises DataError for a bad line."""
    dtype = dtype_for_vocabulary(tokenizer.vocab_size)
    ending = [] if encoding.eod_id is None else [encoding.eod_id]
    tokens: list[list[NDArray[np.integer]]] = [[] for _ in encoding.json_keys]
    num_texts = 0
    for texts in parse_texts(chunk, encoding.json_keys):
        num_texts += 1
        for column, text in enumerate(texts):
            if ids := tokenizer.encode(text):
                tokens[column].append(np.array(ids + ending, dtype=dtype))
    empty = np.empty(0, dtype)
    documents = tuple(
        (np.concatenate([empty, *column]), np.array([len(document) for document in column], dtype=np.int64))
        for column in tokens
    )
    return Encoded(chunk.file, len(chunk.content), num_texts, documents)


def encode_here(chunks: Iterable[Chunk], tokenizer: Tokenizer, encoding: Encoding) -> Iterator[Encoded]:
    """Encode chunks in this process."""
    for chunk in chunks:
        yield encode_chunk(tokenizer, encoding, chunk)
