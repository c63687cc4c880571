"""SentencePiece and Hugging Face tokenizers behind one small interface."""

from __future__ import annotations

from megatron.tokenizer.forms import Form
from megatron.tokenizer.load import find_tokenizer, load_tokenizer, local_tokenizer, read_extra_tokens
from megatron.tokenizer.tokenizer import SpecialTokens, Tokenizer

__all__ = [
    "Form",
    "SpecialTokens",
    "Tokenizer",
    "find_tokenizer",
    "load_tokenizer",
    "local_tokenizer",
    "read_extra_tokens",
]
