"""Texts that cannot be cut: encoded in overlapping parts they have the ids of the whole, and take no longer."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from megatron.tokenizer import load_tokenizer
from megatron.tokenizer.backends import HuggingFaceBackend, SentencePieceBackend
from megatron.tokenizer.joins import Joiner, _Run
from tests.tokenizer.adversarial import Generator
from tests.tokenizer.conftest import train_sentencepiece
from tests.tokenizer.test_engines import MISTRAL

TEXTS = 4_000 if os.environ.get("THOROUGH") else 150
LETTERS = 20_000_000 if os.environ.get("THOROUGH") else 1_000_000


def without_a_cut(draw: random.Random, pieces: Sequence[str]) -> str:
    """A text in which everything may hang together: repeated letters, spaces, pieces without spaces, and periods."""
    kind = draw.randrange(5)
    if kind == 0:
        return draw.choice("ae \n0-日") * draw.randrange(1, 900)
    if kind == 1:
        return "".join(draw.choices("ab ", k=draw.randrange(1, 500)))
    if kind == 2:
        return "".join(draw.choices(pieces, k=draw.randrange(1, 200))).replace("▁", "")
    period = "".join(draw.choices("theati n", k=draw.randrange(2, 9)))
    return period * draw.randrange(1, 90) + draw.choice(("", "x", " "))


@pytest.mark.parametrize("library", ["SentencePiece", "tokenizers"])
def test_in_parts_is_as_a_whole(model_bytes: bytes, json_folder: Path, library: str) -> None:
    """With parts so small that neighbours often share no piece at first."""
    backend: SentencePieceBackend | HuggingFaceBackend = SentencePieceBackend(Path("m"), model_bytes)
    if library == "tokenizers":
        content = (json_folder / "tokenizer.json").read_bytes()
        backend = HuggingFaceBackend(json_folder / "tokenizer.json", content, bos=None, eos=None)
    joiner, draw = backend.joiner(), random.Random(3)
    assert joiner is not None and joiner.is_exact(backend.encode)
    generator, pieces, asked = Generator(9, list(backend.pieces().values())), list(backend.pieces().values()), [0, 0]
    for number in range(TEXTS):
        text = without_a_cut(draw, pieces) if number % 4 else next(generator) or "a"
        size = draw.choice((2, 3, 7, 24, 60))
        longest = 0

        def encode(part: str) -> list[int]:
            nonlocal longest
            longest = max(longest, len(part))
            return backend.encode(part)

        found = list(chain.from_iterable(run.tolist() for run in joiner.encode(text, encode, np.int64, size)))
        assert found == backend.encode(text), (ascii(text), size)
        asked[longest > size + 1] += len(text) > 2 * size >= 48
    assert asked[0] > 9 * asked[1], "almost always a part is enough"


def test_a_join_at_another_piece_is_noticed(model_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trial is for: a joiner that is wrong about this tokenizer is not used."""
    backend = SentencePieceBackend(Path("m"), model_bytes)
    joiner = backend.joiner()
    assert joiner is not None

    def anywhere(self: Joiner, current: _Run, first: int, following: _Run) -> tuple[int, int]:
        return len(current.ids) - 1, 0

    monkeypatch.setattr(Joiner, "_shared_piece", anywhere)
    assert not joiner.is_exact(backend.encode)


@pytest.mark.parametrize(
    "options",
    [
        {"remove_extra_whitespaces": True},
        {"user_defined_symbols": ["ward"]},
        {"byte_fallback": False, "vocab_size": 100},
    ],
)
def test_other_tokenizers_encode_long_texts_as_a_whole(options: dict[str, object]) -> None:
    assert SentencePieceBackend(Path("m"), train_sentencepiece(**options)).joiner() is None


@pytest.mark.parametrize("letter", ["a", " ", "="])
def test_a_line_of_equal_letters(shared: Path, letter: str) -> None:
    """Against SentencePiece on as much as it can do; far more takes as long for each letter."""
    tokenizer = load_tokenizer(shared / MISTRAL)
    text = "in " + letter * 300_000 + " ward"
    ids, sizes = tokenizer.encode_batch([text, "and", text])
    assert ids[: sizes[0]].tolist() == tokenizer.encode(text) and sizes[0] == sizes[2]
    (size,) = tokenizer.encode_batch([letter * LETTERS])[1]
    assert np.isclose(size, LETTERS * sizes[0] / len(text), rtol=1e-3)
