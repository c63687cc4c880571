"""`megatron preprocess`: JSON lines, packed or not, or parquet, to `.bin/.idx` pairs."""

from __future__ import annotations

from megatron.data.preprocess.options import PreprocessOptions
from megatron.data.preprocess.run import Pair, preprocess

__all__ = ["Pair", "PreprocessOptions", "preprocess"]
