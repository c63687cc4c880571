"""What `megatron inspect PREFIX` says of a `.bin/.idx` pair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import IndexedReader
from megatron.data.provenance import Provenance, provenance_path, read_provenance
from megatron.utils.units import format_bytes, format_count


def describe_indexed(prefix: str | Path) -> list[tuple[str, str]]:
    """Rows of (name, value) about a pair: its sizes, the lengths of its sequences, and its tokenizer if known.

    Raises DataError for a damaged pair.
    """
    reader = IndexedReader(prefix)
    bin_bytes, idx_bytes = reader.bin_path.stat().st_size, reader.idx_path.stat().st_size
    rows = [
        ("pair", reader.prefix),
        ("bytes", f"{format_bytes(bin_bytes)} tokens, {format_bytes(idx_bytes)} index"),
        ("dtype", reader.dtype.name),
        ("documents", f"{reader.num_documents:,}"),
        ("sequences", f"{len(reader):,}"),
        ("tokens", f"{reader.num_tokens:,} ({format_count(reader.num_tokens)})"),
    ]
    if len(reader):
        rows.append(("sequence lengths", _lengths(reader.sizes)))
    provenance = read_provenance(prefix)
    if provenance is None:
        return [*rows, ("tokenizer", f"unknown: there is no {provenance_path(prefix).name}")]
    return [*rows, *_tokenizer_rows(provenance)]


def _lengths(sizes: NDArray[np.int32]) -> str:
    low, median, high = np.percentile(sizes, (10, 50, 90), method="lower")
    return (
        f"shortest {sizes.min():,}, 10 % {low:,}, median {median:,}, mean {sizes.mean():,.1f}, 90 % {high:,}, "
        f"longest {sizes.max():,} tokens"
    )


def _tokenizer_rows(provenance: Provenance) -> list[tuple[str, str]]:
    eod = "unknown" if provenance.eod_id is None else f"id {provenance.eod_id}"
    ending = "ends every document" if provenance.append_eod else "not appended"
    sources = ", ".join(f"{source['file']} ({format_bytes(source['bytes'])})" for source in provenance.sources)
    return [
        ("tokenizer", f"{provenance.tokenizer}, fingerprint {provenance.tokenizer_fingerprint}"),
        ("vocabulary", f"{provenance.vocabulary_size:,} tokens, of which added: {_names(provenance.added_tokens)}"),
        ("end of document", f"{eod}, {ending}"),
        ("JSON key", provenance.json_key),
        ("sources", sources),
    ]


def _names(tokens: list[str]) -> str:
    return f"{len(tokens)} ({' '.join(tokens)})" if tokens else "none"
