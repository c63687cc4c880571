"""Strings that tokenizers get wrong, made from a seed; and a command that holds every engine to the reference on them.

    python -m tests.tokenizer.adversarial TOKENIZER [--strings 1000000] [--seed 0] [--data ../shared/data]

encodes that many strings, some very long lines and, with --data, all real text in that folder, by the engine and by the
tokenizer's own library, says how many differ and shows the first, and ends with exit code 1 if any does.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.real_text import real_texts

_TEXT = (
    "the patient was given aspirin for pain and fever after a day of rest Ärzte naïve coöperate mg/dL β-blocker HbA1c "
    "don't I'LL we've it's CamelCaseWord snake_case x86_64 https://example.org/a?b=c&d=%20 3.14159 1,000,000 -40°C "
    "日本語 漢字 かな 한국어 العربية עברית हिन्दी ไทย Ελληνικά русский Straße İstanbul ǅ ﬁ ½ № ™ ∑ → ≥5% \u212b e\u0301"
)
_WORDS = _TEXT.split()
_SPACES = [" ", "  ", "\t", "\n", "\r\n", "\r", "\x0b", "\x0c", "\x85", "\xa0", "\u2003", "\u200b", "\u2028", "\u3000"]
_MARKS = [chr(code) for code in (*range(0x300, 0x370), 0x20D0, 0x20E3, 0xFE0F, 0xFE0E, 0x200D, 0x200C, 0x1F3FB, 0x0E33)]
_EMOJI = ["👩", "👨", "👧", "❤", "🔥", "🏳", "🌈", "👍", "🧑", "🤝", "💻", "🩺", "🇫", "🇷", "#", "1", "☠", "✈"]
_LITERALS = [
    "<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<0xE2>", "<|endoftext|>", "<|begin_of_text|>", "<|im_start|>", "[INST]",
    "<mask>", "[CLS]", "<s", "/s>", "<<s>>", "< s >", "</ s>", "<\u2581s>", "\u2581<s>",
]  # fmt: skip
_BLOCK = 0x80
_BLOCKS = [start for start in range(0, 0x110000, _BLOCK) if not 0xD800 <= start < 0xE000]


class Generator:
    """Endless strings; `pieces` are those of a vocabulary, to be put together in ways that nobody writes."""

    def __init__(self, seed: int, pieces: Sequence[str] = ()) -> None:
        self._random = random.Random(seed)
        self._pieces = [piece for piece in pieces if piece] or _WORDS
        self._blocks = iter(())  # type: Iterator[int]
        self._kinds: list[Callable[[], str]] = [
            self.block, self.planes, self.spaces, self.repeats, self.emoji, self.marks, self.controls, self.literals,
            self.space_marks, self.vocabulary, self.halves, self.overlaps, self.prose, self.mutated, self.mixed,
        ]  # fmt: skip

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return self._random.choice(self._kinds)()

    def block(self) -> str:
        """Characters of one block of Unicode; the blocks take turns, so that none is left out."""
        start = next(self._blocks, None)
        if start is None:
            self._blocks = iter(_BLOCKS)
            start = next(self._blocks)
        return "".join(chr(start + self._random.randrange(_BLOCK)) for _ in range(self._length()))

    def planes(self) -> str:
        """Characters from anywhere, most of which no vocabulary has."""
        blocks = self._random.choices(_BLOCKS, k=self._length())
        return "".join(chr(start + self._random.randrange(_BLOCK)) for start in blocks)

    def spaces(self) -> str:
        """Words between runs of white space of one kind or several."""
        return "".join(
            self._random.choice(_SPACES) * self._random.choice((1, 1, 2, 3, 5, 16, 17, 33))
            + self._random.choice(("", *self._random.choices(_WORDS, k=3)))
            for _ in range(self._random.randint(1, 6))
        )

    def repeats(self) -> str:
        """A short unit many times over."""
        unit = self._random.choice(
            ("a", "=", "-", "ab", " ", "\u2581", "é", "日", "\n", "aba", "x ", self._random.choice(self._pieces))
        )
        return unit * self._random.randint(1, max(1, 300 // len(unit)))

    def emoji(self) -> str:
        """Emoji with joiners, skin tones, selectors, flags and keycaps."""
        joints = ("\u200d", "\ufe0f", "\U0001f3fd", "\u20e3", "", " ")
        return "".join(self._random.choice(_EMOJI) + self._random.choice(joints) for _ in range(self._length()))

    def marks(self) -> str:
        """Letters under heaps of combining marks."""
        return "".join(
            self._random.choice("aeo nक日 \u2581") + "".join(self._random.choices(_MARKS, k=self._random.randint(0, 5)))
            for _ in range(self._length())
        )

    def controls(self) -> str:
        """NULs, other controls and non-characters within text."""
        odd = "\x00\x01\x07\x08\x1b\x7f\x80\x9f\xad\ufeff\ufffd\ufffe\uffff\U0010ffff\ue000"
        return "".join(self._random.choice((*odd, *self._random.choices(_WORDS, k=9))) for _ in range(self._length()))

    def literals(self) -> str:
        """Special tokens written out, whole and broken."""
        between = ("", " ", "\n", "a", "<", ">", *self._random.choices(_WORDS, k=2))
        return "".join(
            self._random.choice(_LITERALS) + self._random.choice(between) for _ in range(self._random.randint(1, 6))
        )

    def space_marks(self) -> str:
        """SentencePiece's own mark for a space, among spaces."""
        parts = ("\u2581", " ", "\u2581\u2581", "▂", *self._random.choices(_WORDS, k=4))
        return "".join(self._random.choice(parts) for _ in range(self._length()))

    def vocabulary(self) -> str:
        """Whole pieces in random order."""
        pieces = "".join(self._random.choices(self._pieces, k=self._length()))
        return pieces if self._random.random() < 0.2 else pieces.replace("\u2581", " ")

    def halves(self) -> str:
        """The beginning of a piece and the end of another, over and over."""
        text = ""
        for _ in range(self._length()):
            first, second = self._random.choices(self._pieces, k=2)
            text += first[: self._random.randint(0, len(first))] + second[self._random.randint(0, len(second)) :]
        return text.replace("\u2581", " ")

    def overlaps(self) -> str:
        """Pieces that share characters with themselves, where the order of merging shows."""
        piece = self._random.choice(self._pieces)
        shift = self._random.randint(1, len(piece))
        return (piece[:shift] * self._random.randint(0, 4) + piece + piece[shift:] * 2).replace("\u2581", " ")

    def prose(self) -> str:
        """Words and numbers."""
        return " ".join(self._random.choices(_WORDS, k=self._length()))

    def mutated(self) -> str:
        """Prose with characters dropped, doubled, replaced and changed in case."""
        text = ""
        for character in self.prose():
            draw = self._random.random()
            other = chr(self._random.choice(_BLOCKS) + self._random.randrange(_BLOCK))
            text += (
                character if draw > 0.2 else character * 2 if draw > 0.15 else character.swapcase() if draw > 0.08
                else other if draw > 0.04 else ""
            )  # fmt: skip
        return text

    def mixed(self) -> str:
        """Several kinds in one string."""
        kinds = self._random.choices(self._kinds[:-1], k=self._random.randint(2, 4))
        return "".join(kind() for kind in kinds)

    def _length(self) -> int:
        return self._random.choice((1, 2, 3, 5, 8, 13, 21, 34))


def long_texts(characters: int) -> dict[str, str]:
    """Lines of so many characters, most without a space in them."""
    generator = random.Random(1)
    letters = "".join(
        generator.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/", k=characters)
    )
    return {
        "base64": letters,
        "one letter": "a" * characters,
        "spaces": " " * characters,
        "lines": "\n" * characters,
        "Chinese": "".join(chr(0x4E00 + generator.randrange(0x3000)) for _ in range(characters)),
        "emoji": "🧑‍⚕️" * (characters // 4),
        "prose": " ".join(generator.choices(_WORDS, k=characters // 8)),
        "prose without spaces": "".join(generator.choices(_WORDS, k=characters // 7)),
        "space marks": "\u2581x" * (characters // 2),
    }


def pieces_of(tokenizer: Tokenizer) -> list[str]:
    """The pieces of a vocabulary as they would stand within a text, byte pieces and control pieces included."""
    letter = tokenizer.encode("a")[-1:]  # at the very beginning of a text, a piece would lose its space
    before = len(tokenizer.decode(letter))
    return [tokenizer.decode([*letter, identity])[before:] for identity in range(tokenizer.vocab_size)]


def differences(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Those of the texts to which the batch engine gives other ids than the tokenizer's own library does."""
    tokens, sizes = tokenizer.encode_batch(texts)
    ends = np.cumsum(sizes)
    return [
        text
        for text, begin, end in zip(texts, ends - sizes, ends, strict=True)
        if tokens[begin:end].tolist() != tokenizer.encode(text)
    ]


def main() -> int:
    """Compare; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="tokenizer.model, tokenizer.json, vocab.json, or a folder")
    parser.add_argument("--strings", type=int, default=1_000_000, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="real text, as ../shared/data has it")
    parser.add_argument("--long", type=int, default=1_000_000, metavar="CHARACTERS", help="length of the long lines")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer)
    generator = Generator(arguments.seed, pieces_of(tokenizer))
    start, found, characters = time.monotonic(), Counter[str](), 0
    for number in range(0, arguments.strings, 1000):
        texts = [next(generator) for _ in range(min(1000, arguments.strings - number))]
        characters += sum(map(len, texts))
        found.update(differences(tokenizer, texts))
    real_characters = 0
    for text in real_texts(arguments.data) if arguments.data else ():
        real_characters += len(text)
        found.update(differences(tokenizer, [text]))
    for name, text in long_texts(arguments.long).items():
        found.update(f"a long line ({name})" for _ in differences(tokenizer, [text]))
    figures = {
        "engine": tokenizer.engine,
        "strings": arguments.strings,
        "characters": characters,
        "characters of real text": real_characters,
        "seconds": round(time.monotonic() - start),
        "different": sum(found.values()),
        "first": [ascii(text[:200]) for text in list(found)[:20]],
    }
    print(json.dumps(figures, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
