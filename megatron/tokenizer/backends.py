"""The two libraries: SentencePiece (`tokenizer.model`) and Hugging Face's `tokenizers` (`tokenizer.json`).

Each is imported only when one of its files is opened. `transformers`' tokenizers are never used: built from a
`tokenizer.model` alone, its LlamaTokenizer gives other ids than SentencePiece wherever white space runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.utils.errors import DataError


class SentencePieceBackend:
    """A `tokenizer.model`. Control pieces such as `<s>` never come out of text."""

    def __init__(self, path: Path, content: bytes) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = self._processor.LoadFromSerializedProto(content) and self._processor.get_piece_size() > 0
        except RuntimeError as error:
            raise DataError(f"{path} is not a SentencePiece model: {error}") from error
        if not loaded:
            raise DataError(f"{path} is not a SentencePiece model: it holds no pieces")
        eos = self._processor.eos_id()
        self.eos_id: int | None = eos if eos >= 0 else None

    def pieces(self) -> dict[int, str]:
        ids = list(range(self._processor.get_piece_size()))
        return dict(zip(ids, self._processor.id_to_piece(ids), strict=True))

    def literals(self) -> dict[str, int]:
        return {}  # SentencePiece finds its user-defined symbols itself

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode(list(ids))
        return text


class HuggingFaceBackend:
    """A `tokenizer.json`. Its special tokens are never read out of text, except those added after its own vocabulary.

    `bos` and `eos` are the sentence tokens that the files beside it name, if any.
    """

    def __init__(self, path: Path, content: bytes, *, bos: str | None, eos: str | None) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more precise
            raise DataError(f"{path} is not a tokenizer.json that `tokenizers` can read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # special tokens in a text are text
        self._sentence_tokens = {bos, eos}
        self.eos_id: int | None = self._tokenizer.token_to_id(eos) if eos is not None else None

    def pieces(self) -> dict[int, str]:
        return {identity: piece for piece, identity in self._tokenizer.get_vocab(with_added_tokens=True).items()}

    def literals(self) -> dict[str, int]:
        own = self._tokenizer.get_vocab(with_added_tokens=False)
        added = sorted(self._tokenizer.get_added_tokens_decoder().items())
        return {
            token.content: identity
            for identity, token in added
            if token.special and token.content not in own and token.content not in self._sentence_tokens
        }

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text
