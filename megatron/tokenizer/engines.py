"""Which engine turns texts into ids when there are many: the fastest that agrees with the tokenizer's own library.

`gigatoken` is optional and encodes several times as fast. It is used where the tokenizer has a form that is exact by
its make (forms.py) and the engine gives the library's ids on every string of a self-test; else the library itself
encodes. The log says which it is, and why.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.tokenizer.forms import Form, NoForm, pattern_of, without_extra_spaces
from megatron.tokenizer.self_test import self_test_strings
from megatron.utils.logging import get_logger

_LOGGER = get_logger(__name__)
_CACHE_BYTES = 192 << 20
_LOOK_CHARACTERS = 1 << 20

Ids = Sequence[int] | NDArray[np.integer]


class Library(Protocol):
    """A tokenizer's own library, whose ids are right by definition."""

    name: str

    def encode(self, text: str) -> list[int]:
        """The ids of a text that is not empty, all of which is text."""
        ...

    def form(self) -> Form:
        """The tokenizer for a faster engine. Raises NoForm."""
        ...

    def pieces(self) -> dict[int, str]:
        """Every id with its piece."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that are all in `pieces`."""
        ...


class Engine(Protocol):
    """What encodes: one text after the other, in the thread that calls."""

    name: str

    def encode_each(self, texts: Sequence[str]) -> Sequence[Ids]:
        """The ids of texts, all of which are text; none for an empty one."""
        ...


class LibraryEngine:
    """A tokenizer's own library."""

    def __init__(self, library: Library) -> None:
        self.name = library.name
        self._library = library

    def encode_each(self, texts: Sequence[str]) -> Sequence[Ids]:
        return [self._library.encode(text) if text else [] for text in texts]


class Gigatoken:
    """`gigatoken`, a BPE engine that remembers how each word was encoded.

    It never forgets, so it is opened anew when the process has grown by `cache_bytes` since it was last.
    """

    def __init__(self, form: Form, library: Library, cache_bytes: int = _CACHE_BYTES) -> None:
        import gigatoken.gigatoken_rs as gigatoken

        self.name = "gigatoken"
        self._load: Callable[[str], Any] = gigatoken.load_hf_json
        self._content = form.content
        self._tidies = form.removes_extra_spaces
        self._library = library
        self._library_only: re.Pattern[str] | None = pattern_of(form.library_only)
        self._cache_bytes = cache_bytes
        self._open()

    def _open(self) -> None:
        self._engine: Any = None  # frees the former before the next takes memory
        self._engine = self._load(self._content)
        self._opened_bytes = _resident_bytes()
        self._unseen_characters = _LOOK_CHARACTERS

    def encode_each(self, texts: Sequence[str]) -> Sequence[Ids]:
        self._forget_in_time(texts)
        if self._tidies:
            texts = [without_extra_spaces(text) for text in texts]
        encode: Callable[[str], NDArray[np.uint32]] = self._engine.encode
        if (pattern := self._library_only) is None:
            return [encode(text) for text in texts]
        return [self._library.encode(text) if pattern.search(text) else encode(text) for text in texts]

    def _forget_in_time(self, texts: Sequence[str]) -> None:
        self._unseen_characters -= sum(map(len, texts))
        if self._unseen_characters < 0:
            self._unseen_characters = _LOOK_CHARACTERS
            if _resident_bytes() - self._opened_bytes > self._cache_bytes:
                self._open()


def choose_engine(
    library: Library, open_fast: Callable[[Form, Library], Engine] = Gigatoken, form: Form | None = None
) -> Engine:
    """The fastest engine that is exact for this tokenizer; one line in the log says which, and why.

    `form` is the library's, where another process has made it, which takes a moment.
    """
    try:
        engine = open_fast(form or library.form(), library)
        strings = self_test_strings(library.pieces(), library.decode)
        found = engine.encode_each(strings)
        different = [text for text, ids in zip(strings, found, strict=True) if list(ids) != library.encode(text)]
    except NoForm as reason:
        return _library(library, f"{reason}, which gigatoken does not reproduce")
    except ImportError:
        return _library(library, "gigatoken, which is several times as fast, is not installed: pip install gigatoken")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        # Whatever else it raises, a panic of compiled code (a BaseException) among them, it cannot be relied upon.
        return _library(library, f"gigatoken does not take this tokenizer ({type(error).__name__}: {error})")
    if different:
        count, example = len(different), ascii(min(different, key=len))
        return _library(library, f"gigatoken gives other ids on {count} of {len(strings)} strings, as {example}")
    _LOGGER.info("encoding by %s, which gave the ids of %s on %d strings", engine.name, library.name, len(strings))
    return engine


def _library(library: Library, reason: str) -> Engine:
    _LOGGER.info("encoding by %s: %s", library.name, reason)
    return LibraryEngine(library)


def _resident_bytes() -> int:
    """Memory that this process holds now; 0 where that cannot be told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0
