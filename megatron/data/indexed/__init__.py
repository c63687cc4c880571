"""Megatron's `MMIDIDX` pairs: `PREFIX.bin` and `PREFIX.idx`."""

from __future__ import annotations

from megatron.data.indexed.format import clean_prefix, dtype_for_vocabulary, pair_paths
from megatron.data.indexed.reader import IndexedReader, require_pair
from megatron.data.indexed.writer import IndexedWriter, Written, copy_bytes, publish_pair

__all__ = [
    "IndexedReader",
    "IndexedWriter",
    "Written",
    "clean_prefix",
    "copy_bytes",
    "dtype_for_vocabulary",
    "pair_paths",
    "publish_pair",
    "require_pair",
]
