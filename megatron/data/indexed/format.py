"""Megatron's `MMIDIDX` pairs: `PREFIX.bin` (the tokens, back to back) and `PREFIX.idx` (where each sequence is).

This module owns the bytes of the two files and every check on them. It must not know what tokens mean, in which order
they are read, nor torch. Format: a 34-byte header (magic, version, dtype code, number of sequences `n`, length of the
document index `d`), then i32[n] sizes, i64[n] byte offsets, i64[d] the sequence at which each document starts and a
closing `n`; everything little-endian.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
LEGACY_MAGIC = b"TNTIDX\x00\x00"
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CODES = {np.dtype(name): code for code, name in DTYPES.items()}
FLOAT_CODES = (6, 7)
MAX_SEQUENCE = 2**31 - 1
CHUNK = 1 << 20  # entries of the index that are worked on at a time: memory stays small whatever the corpus
_UINT16_VOCABULARY = 65_500  # Megatron's own limit, a little under what u16 could hold


def dtype_for_vocabulary(size: int) -> np.dtype:
    """The dtype that Megatron chooses: u16 for a vocabulary (added tokens included) below 65,500, else i32."""
    return np.dtype("<u2") if size < _UINT16_VOCABULARY else np.dtype("<i4")


def clean_prefix(prefix: str | Path) -> str:
    """A prefix as users give it, without the `.bin` or `.idx` that they may have left on it."""
    return str(prefix).removesuffix(".bin").removesuffix(".idx")


def pair_paths(prefix: str | Path) -> tuple[Path, Path]:
    """The paths of a prefix's `.bin` and `.idx`. (A prefix may hold dots, so `Path.with_suffix` would not do.)"""
    clean = clean_prefix(prefix)
    return Path(f"{clean}.bin"), Path(f"{clean}.idx")
