"""What `megatron inspect PREFIX` says of a `.bin/.idx` pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import IndexedReader
from megatron.data.provenance import Provenance, provenance_path, read_provenance
from megatron.utils.units import format_bytes, format_count


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
    tokenizer = description["tokenizer"]
    if tokenizer is None:
        return [*rows, ("tokenizer", f"unknown: there is no {provenance_path(description['pair']).name}")]
    return [*rows, *_tokenizer_rows(tokenizer)]


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
