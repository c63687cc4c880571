"""The two libraries: SentencePiece (`tokenizer.model`) and Hugging Face's `tokenizers` (`tokenizer.json`).

Each is imported only when one of its files is opened, and its ids are right by definition. `transformers`' tokenizers
are never used: built from a `tokenizer.model` alone, its LlamaTokenizer gives other ids than SentencePiece wherever
white space runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.tokenizer.cuts import Cutter, MarkedSpaceCutter, WordCutter
from megatron.tokenizer.forms import SPACE_MARK, Form, hugging_face_form, sentencepiece_form
from megatron.tokenizer.joins import Joiner
from megatron.tokenizer.model_file import ModelFile, PieceKind
from megatron.utils.errors import DataError

# How GPT-4, Llama-3 and Qwen2 split a text into words. As in GPT-2's, a space between two letters begins a word.
_WORD_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
}
_MARKING = [
    {"type": "Prepend", "prepend": SPACE_MARK},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
]
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class SentencePieceBackend:
    """A `tokenizer.model`. Control pieces such as `<s>` never come out of text."""

    name = "SentencePiece"

    def __init__(self, path: Path, content: bytes) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = self._processor.LoadFromSerializedProto(content) and self._processor.get_piece_size() > 0
        except RuntimeError as error:
            raise DataError(f"{path} is not a SentencePiece model: {error}") from error
        if not loaded:
            raise DataError(f"{path} is not a SentencePiece model: it holds no pieces")
        self._content = content
        ids = list(range(self._processor.get_piece_size()))
        self._pieces: dict[int, str] = dict(zip(ids, self._processor.id_to_piece(ids), strict=True))
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self.bos_id: int | None = bos if bos >= 0 else None
        self.eos_id: int | None = eos if eos >= 0 else None

    def pieces(self) -> dict[int, str]:
        return dict(self._pieces)

    def literals(self) -> dict[str, int]:
        return {}  # SentencePiece finds its user-defined symbols itself

    def controls(self) -> dict[str, int]:
        return {piece: identity for identity, piece in self._pieces.items() if self._processor.is_control(identity)}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode(list(ids))
        return text

    @cached_property
    def _model(self) -> ModelFile:
        return ModelFile.parse(self._content)

    @property
    def _marks_spaces(self) -> bool:
        """Whether it encodes as cutter and joiner have it."""
        model = self._model
        marks = model.marks_spaces and model.adds_leading_space and not model.space_as_suffix
        return model.is_bpe and model.byte_fallback and marks and not model.has_character_map

    def form(self) -> Form:
        return sentencepiece_form(self._model)

    def markup_encoder(self, added: Mapping[str, int]) -> Callable[[str], list[int]] | None:
        return None

    def cutter(self) -> Cutter | None:
        if not self._marks_spaces:
            return None
        fixed = (PieceKind.UNKNOWN, PieceKind.CONTROL, PieceKind.BYTE)
        return MarkedSpaceCutter(piece.text for piece in self._model.pieces if piece.kind not in fixed)

    def joiner(self) -> Joiner | None:
        model = self._model
        others = model.of_kind(PieceKind.USER_DEFINED) or model.of_kind(PieceKind.UNUSED)
        if not self._marks_spaces or others or model.removes_extra_spaces:
            return None
        texts = {identity: text for text, identity in model.of_kind(PieceKind.NORMAL).items()}
        return Joiner(texts, {identity: int(text[3:5], 16) for text, identity in model.of_kind(PieceKind.BYTE).items()})


class HuggingFaceBackend:
    """A `tokenizer.json`. Its special tokens are never read out of text, except those added after its own vocabulary.

    `bos` and `eos` are the sentence tokens that the files beside it name, if any.
    """

    name = "tokenizers"

    def __init__(self, path: Path, content: bytes, *, bos: str | None, eos: str | None) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more precise
            raise DataError(f"{path} is not a tokenizer.json that `tokenizers` can read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # special tokens in a text are text
        self._content = content
        self._sentence_tokens = {bos, eos}
        self.bos_id: int | None = self._tokenizer.token_to_id(bos) if bos is not None else None
        self.eos_id: int | None = self._tokenizer.token_to_id(eos) if eos is not None else None

    def pieces(self) -> dict[int, str]:
        return {identity: piece for piece, identity in self._tokenizer.get_vocab(with_added_tokens=True).items()}

    def literals(self) -> dict[str, int]:
        own = self._tokenizer.get_vocab(with_added_tokens=False)
        return {
            token: identity
            for token, identity in self._special().items()
            if token not in own and token not in self._sentence_tokens
        }

    def controls(self) -> dict[str, int]:
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        return {token: identity for token, identity in self._special().items() if token != unknown}

    def markup_encoder(self, added: Mapping[str, int]) -> Callable[[str], list[int]] | None:
        import tokenizers

        encoder = tokenizers.Tokenizer.from_buffer(self._content)
        encoder.no_truncation()
        encoder.no_padding()
        encoder.encode_special_tokens = False
        encoder.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in added])
        if moved := [token for token, identity in added.items() if encoder.token_to_id(token) != identity]:
            raise DataError(f"`tokenizers` would give the added token {moved[0]} another id than {added[moved[0]]}")
        return lambda text: encoder.encode(text, add_special_tokens=False).ids

    def _special(self) -> dict[str, int]:
        added = sorted(self._tokenizer.get_added_tokens_decoder().items())
        return {token.content: identity for identity, token in added if token.special}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def form(self) -> Form:
        return hugging_face_form(self._content)

    def cutter(self) -> Cutter | None:
        whole: dict[str, Any] = json.loads(self._content)
        plain = any(not token.get("special") for token in whole.get("added_tokens") or [])
        model, normalizer, splitter = (whole.get(key) or {} for key in ("model", "normalizer", "pre_tokenizer"))
        if plain or model.get("type", "BPE") != "BPE":
            return None
        if not splitter and normalizer.get("normalizers") == _MARKING and model.get("byte_fallback"):
            return MarkedSpaceCutter(model["vocab"])
        return WordCutter() if not normalizer and _splits_into_words(splitter) else None

    def joiner(self) -> Joiner | None:
        cutter, model = self.cutter(), json.loads(self._content)["model"]
        if not isinstance(cutter, MarkedSpaceCutter) or model.get("ignore_merges") or model.get("dropout"):
            return None
        bytes_of = {identity: int(text[3:5], 16) for text, identity in model["vocab"].items() if _BYTE.fullmatch(text)}
        return Joiner({identity: text for text, identity in model["vocab"].items()}, bytes_of)


def _splits_into_words(splitter: dict[str, Any]) -> bool:
    """Whether a pre_tokenizer of a tokenizer.json is GPT-2's, or another of which it is known how it splits."""
    if splitter.get("type") == "ByteLevel":
        return bool(splitter.get("use_regex", True))
    parts = splitter.get("pretokenizers") or []
    return (
        [part.get("type") for part in parts] == ["Split", "ByteLevel"]
        and parts[0].get("pattern", {}).get("Regex") in _WORD_PATTERNS
        and parts[0].get("behavior") == "Isolated"
        and not parts[0].get("invert")
        and not parts[1].get("use_regex", True)
    )
