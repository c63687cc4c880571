"""Some documents of a pair, decoded: to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.data.explain import line_of
from megatron.data.indexed import IndexedReader
from megatron.data.provenance import read_provenance
from megatron.tokenizer import load_tokenizer
from megatron.utils.errors import ConfigError, DataError


@dataclass(frozen=True)
class Document:
    """A document's number in its pair, its length, its text (or ids), whether that was cut off, and the file and line
    it is from."""

    number: int
    tokens: int
    text: str
    cut: bool
    line: tuple[str, int] | None


def sample_documents(
    prefix: str, *, documents: int, first: int | None, seed: int, tokenizer: str | None, most_tokens: int
) -> Iterator[Document]:
    """So many documents of a pair in file order: from `first` on, or where that is None, random ones.

    At most `most_tokens` of each. Without a tokenizer the text is the ids. Raises ConfigError for a number that is not
    there, DataError for a pair that is damaged or was made with another tokenizer.
    """
    reader = IndexedReader(prefix)
    if documents < 1 or most_tokens < 1 or (first is not None and not 0 <= first < reader.num_documents):
        raise ConfigError(
            f"--documents {documents}, --tokens {most_tokens}{'' if first is None else f', --first {first}'}: {prefix} "
            f"has {reader.num_documents:,} documents, from 0; ask for one or more, and for a token or more of each"
        )
    if seed < 0:
        raise ConfigError(f"--seed {seed} is negative; use 0 or more")
    if first is None:
        some = min(documents, reader.num_documents)
        numbers = sorted(np.random.default_rng(seed).choice(reader.num_documents, some, replace=False).tolist())
    else:
        numbers = list(range(first, min(first + documents, reader.num_documents)))
    provenance = read_provenance(prefix)
    decoder = None
    if tokenizer is not None:
        decoder = load_tokenizer(Path(tokenizer), [] if provenance is None else provenance.added_tokens)
        if provenance is not None and decoder.fingerprint != provenance.tokenizer_fingerprint:
            raise DataError(
                f"{prefix} was made with another tokenizer ({provenance.tokenizer}) than {tokenizer}, so its ids mean "
                "other tokens; name that one"
            )
    for number in numbers:
        low, high = reader.document_index[number : number + 2].tolist()
        tokens = [token for sequence in range(low, high) for token in reader.read(sequence).tolist()]
        shown = tokens[:most_tokens]
        if decoder is not None and (strange := [one for one in shown if not 0 <= one < decoder.vocab_size]):
            raise DataError(
                f"document {number:,} of {prefix} holds the token {strange[0]}, which {tokenizer} does not have (of "
                f"{decoder.vocab_size:,}): name the tokenizer that it was made with, or copy a damaged pair again"
            )
        text = " ".join(map(str, shown)) if decoder is None else decoder.decode(shown)
        yield Document(number, len(tokens), text, len(shown) < len(tokens), line_of(provenance, number))
