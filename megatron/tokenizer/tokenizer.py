"""The tokenizer that the rest of the project sees, and what it asks of a library.

This module owns the rule for literal tokens in text. A tokenizer's own control tokens (`<s>`, `</s>`) written out in a
text are text: a document cannot end itself. Tokens that were added after the tokenizer's own pieces become their
id wherever they occur, and the text between them is encoded piece by piece, each with its own leading space mark, as
Megatron-LLM does. As a choice (`special_tokens="ids"`) control tokens become ids as well, which is Megatron-LLM's rule.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron.tokenizer.cuts import PART_CHARACTERS, Cutter
from megatron.tokenizer.engines import Engine, Ids, Library, choose_engine
from megatron.tokenizer.forms import Form, NoForm, pattern_of
from megatron.tokenizer.joins import Joiner
from megatron.utils.errors import DataError

SpecialTokens = Literal["text", "ids"]
"""What a control token that is written out in a text becomes."""


class Backend(Library, Protocol):
    """A library's tokenizer: text without literal tokens to ids, and back."""

    bos_id: int | None
    eos_id: int | None

    def literals(self) -> dict[str, int]:
        """Tokens among `pieces` that become their id when they occur in a text."""
        ...

    def controls(self) -> dict[str, int]:
        """Tokens among `pieces` that stand for no text, such as those that begin and end a sentence."""
        ...

    def markup_encoder(self, added: Mapping[str, int]) -> Callable[[str], list[int]] | None:
        """The library's own way with texts whose special tokens, those `added` too, are such; None if it has none.
        Raises DataError where it has other ids for them."""
        ...

    def cutter(self) -> Cutter | None:
        """Cuts long texts where that changes no id; None if it is not known where that is."""
        ...

    def joiner(self) -> Joiner | None:
        """Encodes long texts that cannot be cut in parts; None if the tokenizer is none of which that is known."""
        ...


class _Literals:
    """Tokens that become ids where they occur in a text."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = dict(ids)
        self._pattern = pattern_of(ids)
        self._rare_characters = sorted({min(token, key=_commonness) for token in ids})

    def occur_in(self, text: str) -> bool:
        # Most texts lack the tokens' rarest characters, and to look for one character is many times as fast.
        if self._pattern is None or not any(character in text for character in self._rare_characters):
            return False
        return self._pattern.search(text) is not None

    def find_in(self, text: str) -> list[str]:
        return self._pattern.findall(text) if self.occur_in(text) and self._pattern is not None else []

    def split(self, text: str) -> Iterator[str | int]:
        """The texts between tokens, none empty, and the ids of tokens."""
        if self._pattern is None:
            yield text
            return
        # Splitting by a pattern in parentheses gives text and tokens in turn.
        for at, part in enumerate(self._pattern.split(text)):
            if at % 2:
                yield self._ids[part]
            elif part:
                yield part


class Tokenizer:
    """Text to ids and back, with added tokens.

    `added` are tokens with ids past the backend's pieces; `literals` are all tokens that become their id where they
    occur in a text, the one first in the mapping where two start at the same place, and `literal_ids` the same under
    `special_tokens="ids"`. `files` are to be kept beside a checkpoint, `form` is what `form()` gave in another process.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        added: Mapping[str, int],
        literals: Mapping[str, int],
        literal_ids: Mapping[str, int],
        files: Sequence[Path],
        form: Form | None = None,
    ) -> None:
        self._backend, self._form = backend, form
        self._pieces = backend.pieces()
        self._pieces.update({identity: token for token, identity in added.items()})
        self._ids = {piece: identity for identity, piece in self._pieces.items()}
        self._literals: dict[SpecialTokens, _Literals] = {"text": _Literals(literals), "ids": _Literals(literal_ids)}
        self._added = dict(added)
        self._added_ids = set(added.values())
        self.added_tokens = sorted(added, key=lambda token: added[token])
        self.vocab_size = max(self._pieces, default=-1) + 1
        self.bos_id = backend.bos_id
        self.eos_id = backend.eos_id
        self.special_ids = frozenset(literal_ids.values())  # of tokens that stand for no text
        self.files = list(files)

    @property
    def engine(self) -> str:
        """The name of what encodes batches; choosing it takes a moment the first time, and is told in the log."""
        return self._engine.name

    @cached_property
    def _engine(self) -> Engine:
        return choose_engine(self._backend, form=self._form)

    def form(self) -> Form | None:
        """The tokenizer for a faster engine; None if there is none that is exact."""
        try:
            return self._form or self._backend.form()
        except NoForm:
            return None

    @cached_property
    def _markup_encoder(self) -> Callable[[str], list[int]] | None:
        return self._backend.markup_encoder(self._added)

    @cached_property
    def _cutter(self) -> Cutter | None:
        return self._backend.cutter()

    @cached_property
    def _joiner(self) -> Joiner | None:
        joiner = self._backend.joiner()
        return joiner if joiner is not None and joiner.is_exact(self._encode_whole) else None

    def encode(self, text: str, special_tokens: SpecialTokens = "text") -> list[int]:
        """The ids of a text, by the tokenizer's own library: no beginning or end of sentence is added, and none is
        read out of the text unless `special_tokens` is "ids". Raises DataError for half of a surrogate pair.
        """
        _check_text(text)
        ids: list[int] = []
        for part in self._literals[special_tokens].split(text):
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids.extend(self._backend.encode(part))
        return ids

    def encode_batch(
        self, texts: Sequence[str], dtype: DTypeLike = np.int32, special_tokens: SpecialTokens = "text"
    ) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """The ids of all texts back to back in `dtype`, which must hold them, and how many each text has: those that
        `encode` gives, by the fastest engine. Raises DataError for half of a surrogate pair.
        """
        literals = self._literals[special_tokens]
        in_parts = [len(text) > PART_CHARACTERS or literals.occur_in(text) for text in texts]
        try:
            wholes = iter(
                self._engine.encode_each([text for text, cut in zip(texts, in_parts, strict=True) if not cut])
            )
            runs = [
                self._encode_parts(text, np.dtype(dtype), literals) if cut else next(wholes)
                for text, cut in zip(texts, in_parts, strict=True)
            ]
        except Exception:  # each engine has an error of its own for what is no text
            for text in texts:
                _check_text(text)
            raise
        sizes = np.fromiter(map(len, runs), np.int64, len(runs))
        return np.concatenate([np.empty(0, dtype), *runs], dtype=dtype, casting="unsafe"), sizes

    def _encode_parts(self, text: str, dtype: np.dtype, literals: _Literals) -> Ids:
        """The ids of a text with literal tokens, or so long that it is cut."""
        runs = [np.empty(0, dtype)]
        for part in literals.split(text):
            if isinstance(part, int):
                runs.append(np.array([part], dtype))
                continue
            cut = self._cutter.parts(part) if len(part) > PART_CHARACTERS and self._cutter else [(part, 0)]
            for piece, left_out in cut:
                first, *others = self._encode_long(piece, dtype)
                runs += [first[left_out:], *others]
        return np.concatenate(runs)

    def _encode_long(self, text: str, dtype: np.dtype) -> list[NDArray[np.integer]]:
        """The ids of a text in runs, the first of which is not empty."""
        if len(text) > 2 * PART_CHARACTERS and self._joiner is not None:
            return self._joiner.encode(text, self._encode_whole, dtype)
        return [np.asarray(self._encode_whole(text), dtype)]

    def _encode_whole(self, text: str) -> Ids:
        return self._engine.encode_each([text])[0]

    def encode_markup(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """The ids of each text, whose special tokens are such, as a chat template writes them.

        A `tokenizer.json` may say that they take the spaces beside them, or that no space mark follows them: its
        library knows. Else the text between them is encoded piece by piece.
        """
        if self._markup_encoder is not None:
            return [np.array(self._markup_encoder(text), dtype=np.int32) for text in texts]
        ids, sizes = self.encode_batch(texts, special_tokens="ids")
        return np.split(ids, np.cumsum(sizes[:-1]))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; added tokens appear as they are written, with no space around them."""
        parts: list[str] = []
        run: list[int] = []
        for identity in ids:
            if identity in self._added_ids:
                parts += [self._backend.decode(run), self._pieces[identity]]
                run = []
            else:
                run.append(identity)
        return "".join([*parts, self._backend.decode(run)])

    def special_tokens_in(self, text: str) -> list[str]:
        """The tokens written out in a text that become ids under `special_tokens="ids"`, each as often as it occurs."""
        return self._literals["ids"].find_in(text)

    def token_id(self, piece: str) -> int | None:
        """The id of a piece as the vocabulary writes it (`▁the`, `</s>`), or None."""
        return self._ids.get(piece)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every id and its piece, added tokens included: what the ids in a data file mean.

        It depends on neither names, folders nor formatting: a `tokenizer.model` and the `tokenizer.json` converted from
        it agree.
        """
        content = json.dumps(sorted(self._pieces.items()), separators=(",", ":"))
        return hashlib.sha256(content.encode("ascii")).hexdigest()


def _commonness(character: str) -> tuple[bool, bool]:
    """Orders characters by how often they stand in a text, roughly."""
    return character.islower() or character.isspace(), character.isalnum()


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"a text holds half of a surrogate pair (\\u{ord(text[error.start]):04x} at character {error.start}), "
            "which stands for no character; replace it, as Python's errors='replace' does"
        ) from error
