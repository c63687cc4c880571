"""What `megatron inspect PREFIX` says of a `.bin/.idx` pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import IndexedReader
from megatron.data.provenance import Provenance, check_checksums, provenance_path, read_provenance
from megatron.utils.errors import DataError
from megatron.utils.units import format_bytes, format_count

_CHUNK_TOKENS = 1 << 22


def describe_indexed(prefix: str | Path) -> dict[str, Any]:
    """All there is to say about a pair, as JSON values: its sizes, the lengths of its sequences, its tokenizer (None:
    unknown).

    Raises DataError for a damaged pair.
    """
    reader = IndexedReader(prefix)
    provenance = read_provenance(prefix)
    return {
        "pair": reader.prefix,
        "token_bytes": reader.bin_path.stat().st_size,
        "index_bytes": reader.idx_path.stat().st_size,
        "dtype": reader.dtype.name,
        "documents": int(reader.num_documents),
        "sequences": len(reader),
        "tokens": int(reader.num_tokens),
        "sequence_lengths": _lengths(reader.sizes) if len(reader) else None,
        "length_histogram": histogram(reader.sizes),
        "tokenizer": None if provenance is None else _tokenizer(provenance),
    }


def table_of_pair(description: dict[str, Any]) -> list[tuple[str, str]]:
    """The description as (label, text) in reading order, without what does not apply."""
    sizes = f"{format_bytes(description['token_bytes'])} tokens, {format_bytes(description['index_bytes'])} index"
    rows = [
        ("pair", description["pair"]),
        ("bytes", sizes),
        ("dtype", description["dtype"]),
        ("documents", f"{description['documents']:,}"),
        ("sequences", f"{description['sequences']:,}"),
        ("tokens", f"{description['tokens']:,} ({format_count(description['tokens'])})"),
    ]
    if lengths := description["sequence_lengths"]:
        rows.append(("sequence lengths", _lengths_text(lengths)))
        rows += _histogram_rows(description["length_histogram"])
    tokenizer = description["tokenizer"]
    if tokenizer is None:
        return [*rows, ("tokenizer", f"unknown: there is no {provenance_path(description['pair']).name}")]
    return [*rows, *_tokenizer_rows(tokenizer)]


def verify_pair(prefix: str | Path) -> str:
    """Read all of a pair; what was found to be right, in words.

    Its structure, that each token is of the vocabulary, and what its .json says: counts and checksums. Raises DataError
    for what is damaged.
    """
    reader = IndexedReader(prefix)
    provenance = read_provenance(prefix)
    found = [f"the structure of {len(reader):,} sequences"]
    size = None if provenance is None else provenance.vocabulary_size
    for start in range(0, reader.num_tokens, _CHUNK_TOKENS):
        tokens = reader.read_stream(start, min(start + _CHUNK_TOKENS, reader.num_tokens))
        wrong = (tokens < 0) if size is None else (tokens < 0) | (tokens >= size)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(
                f"{reader.bin_path}: token {start + at:,} of the file is {tokens[at]}, "
                + (f"not among the vocabulary of {size:,}" if tokens[at] >= 0 else "negative")
                + "; copy the pair again, or write it again with `megatron preprocess`"
            )
    found.append(f"{reader.num_tokens:,} tokens" + ("" if size is None else f" of a vocabulary of {size:,}"))
    if provenance is not None:
        stated = (provenance.documents, provenance.tokens, np.dtype(provenance.dtype).name)
        actual = (reader.num_documents, int(reader.num_tokens), reader.dtype.name)
        if stated != actual:
            raise DataError(
                f"{provenance_path(prefix)} describes {stated[0]:,} documents and {stated[1]:,} tokens of {stated[2]}, "
                f"but the pair has {actual[0]:,} and {actual[1]:,} of {actual[2]}: it belongs to another pair"
            )
        checked_bytes = check_checksums(prefix, provenance)
        if checked_bytes:
            found.append(f"the checksums of {format_bytes(checked_bytes)}")
    if len(found) < 3:
        found.append("no checksums are known")
    return ", ".join(found)


def histogram(sizes: NDArray[np.int32]) -> list[dict[str, int]]:
    """Sequences and their tokens by length: empty ones, then from each power of two to below the next."""
    bits = np.zeros(len(sizes), dtype=np.int64)
    bits[sizes > 0] = np.frexp(sizes[sizes > 0].astype(np.float64))[1]
    sequences, tokens = np.bincount(bits), np.bincount(bits, weights=sizes)
    return [
        {
            "from": 0 if bit == 0 else 1 << (bit - 1),
            "to": 0 if bit == 0 else (1 << bit) - 1,
            "sequences": int(sequences[bit]),
            "tokens": int(tokens[bit]),
        }
        for bit in range(len(sequences))
        if sequences[bit]
    ]


def _histogram_rows(bins: list[dict[str, int]]) -> list[tuple[str, str]]:
    sequences, tokens = sum(one["sequences"] for one in bins), max(1, sum(one["tokens"] for one in bins))
    return [
        (
            f"  {one['from']:,} to {one['to']:,}",
            f"{one['sequences']:>12,} sequences {100 * one['sequences'] / sequences:5.1f} %  "
            f"{100 * one['tokens'] / tokens:5.1f} % of the tokens",
        )
        for one in bins
    ]


def _lengths(sizes: NDArray[np.int32]) -> dict[str, int | float]:
    """Lengths in tokens: extremes, mean and percentiles."""
    low, median, high = np.percentile(sizes, (10, 50, 90), method="lower").tolist()
    return {
        "shortest": int(sizes.min()),
        "percentile_10": low,
        "median": median,
        "mean": float(sizes.mean()),
        "percentile_90": high,
        "longest": int(sizes.max()),
    }


def _lengths_text(lengths: dict[str, int | float]) -> str:
    return (
        f"shortest {lengths['shortest']:,}, 10 % {lengths['percentile_10']:,}, median {lengths['median']:,}, "
        f"mean {lengths['mean']:,.1f}, 90 % {lengths['percentile_90']:,}, longest {lengths['longest']:,} tokens"
    )


def _tokenizer(provenance: Provenance) -> dict[str, Any]:
    return {
        "name": provenance.tokenizer,
        "fingerprint": provenance.tokenizer_fingerprint,
        "vocabulary_size": provenance.vocabulary_size,
        "added_tokens": provenance.added_tokens,
        "eod_id": provenance.eod_id,
        "append_eod": provenance.append_eod,
        "json_key": provenance.json_key,
        "sources": provenance.sources,
    }


def _tokenizer_rows(tokenizer: dict[str, Any]) -> list[tuple[str, str]]:
    eod = "unknown" if tokenizer["eod_id"] is None else f"id {tokenizer['eod_id']}"
    ending = "ends every document" if tokenizer["append_eod"] else "not appended"
    sources = ", ".join(f"{source['file']} ({format_bytes(source['bytes'])})" for source in tokenizer["sources"])
    return [
        ("tokenizer", f"{tokenizer['name']}, fingerprint {tokenizer['fingerprint']}"),
        ("vocabulary", f"{tokenizer['vocabulary_size']:,} tokens, of which added: {_names(tokenizer['added_tokens'])}"),
        ("end of document", f"{eod}, {ending}"),
        ("JSON key", tokenizer["json_key"]),
        ("sources", sources),
    ]


def _names(tokens: list[str]) -> str:
    return f"{len(tokens)} ({' '.join(tokens)})" if tokens else "none"
