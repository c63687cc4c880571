"""The tokenizer that the rest of the project sees, and what it asks of a library.

This module owns the rule for literal tokens in text. A tokenizer's own control tokens (`<s>`, `</s>`) written out in a
text are text: a document cannot end itself. Tokens that were added after the tokenizer's own pieces become their
id wherever they occur, and the text between them is encoded piece by piece, each with its own leading space mark, as
Megatron-LLM does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol


class Backend(Protocol):
    """A library's tokenizer: text without literal tokens to ids, and back."""

    eos_id: int | None

    def pieces(self) -> dict[int, str]:
        """Every id with its piece."""
        ...

    def literals(self) -> dict[str, int]:
        """Tokens among `pieces` that become their id when they occur in a text."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text, all of which is text. No beginning or end of sentence is added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that are all in `pieces`."""
        ...


class Tokenizer:
    """Text to ids and back, with added tokens.

    `added` are tokens with ids past the backend's pieces; `literals` are all tokens that become their id where they
    occur in a text, the one first in the mapping where two start at the same place. `files` are to be kept beside a
    checkpoint.
    """

    def __init__(
        self, backend: Backend, *, added: Mapping[str, int], literals: Mapping[str, int], files: Sequence[Path]
    ) -> None:
        self._backend = backend
        self._pieces = backend.pieces()
        self._pieces.update({identity: token for token, identity in added.items()})
        self._ids = {piece: identity for identity, piece in self._pieces.items()}
        self._literals = dict(literals)
        self._added_ids = set(added.values())
        pattern = "|".join(re.escape(token) for token in literals)
        self._pattern = re.compile(f"({pattern})") if pattern else None
        self.added_tokens = sorted(added, key=lambda token: added[token])
        self.vocab_size = max(self._pieces, default=-1) + 1
        self.eos_id = backend.eos_id
        self.files = list(files)

    def encode(self, text: str) -> list[int]:
        """The ids of a text: no beginning or end of sentence is added, and none is read out of the text."""
        if self._pattern is None:
            return self._backend.encode(text) if text else []
        ids: list[int] = []
        # Splitting by a pattern in parentheses gives text and tokens in turn.
        for at, part in enumerate(self._pattern.split(text)):
            if at % 2:
                ids.append(self._literals[part])
            elif part:
                ids.extend(self._backend.encode(part))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

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
