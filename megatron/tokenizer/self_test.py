"""Strings that tell whether an engine gives the ids of a tokenizer's own library: asked at every start, in a moment."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from megatron.tokenizer.forms import SPACE_MARK

_FROM_VOCABULARY = 150
_BLOCK = 0x100

_EDGES = [
    " ", "  ", "\n", "\t", "\r\n", "\x00", SPACE_MARK, SPACE_MARK * 3, " a", "a ", " a ", "a  b", "a\n\nb\t\tc",
    "a \n b", "\n a", f" {SPACE_MARK} ", f"a{SPACE_MARK}b", f"a{SPACE_MARK} b", f"{SPACE_MARK}a{SPACE_MARK}",
    "<s>", "</s>", "<s> a</s>", "a<s>b", "<unk>", "<pad>", "<0x0A>", "<|endoftext|>", "[CLS]", "<mask>", "<s", "/s>",
    "the patient's HbA1c was 7.5 % (normal: < 6 %)", "DON'T we'll I'VE it'S", "3.14159 1,000,000 x86_64 -40 °C",
    "camelCase snake_case https://example.org/a?b=c&d=%20", "\\n \\t {\"a\": [1, 2]}",
    "if (x) {\n\t\treturn 1;\n    }\n", "µg ≥ 5 % → ∑ № ™ € “q” – — …",
    "é e\u0301 ẹ\u0301\u0302 ﬁ ½ Å \u212b ǆ İ ß ſ", "日本語の文 中文。한국어 العربية עברית हिन्दी ไทย",
    "👩‍⚕️ 🏳️‍🌈 🇫🇷 👍🏽 1️⃣ ❤️", "a\xa0b\u2003c\u200bd\u2028e\u3000f\ufefff",
    "\x01\x7f\x80\x85\xad", "\ufffd\ufffe\uffff\U0010ffff",
    "x" * 300, "ab" * 150, "aaab" * 60, "\u00a0" * 9, "0" * 50,
]  # fmt: skip


def self_test_strings(pieces: Mapping[int, str], decode: Callable[[list[int]], str]) -> list[str]:
    """Some hundred strings, the same at each call: edges, runs, blocks of Unicode, and some made of the pieces."""
    strings = list(_EDGES)
    for unit in (" ", SPACE_MARK, "\n", "\t", "=", "-", "a", "."):
        strings += [f"{before}{unit * count}b" for before in ("", "a") for count in (2, 3, 4, 7, 15, 16, 17, 33, 70)]
    strings += _unicode()
    strings += _of_pieces(pieces, decode)
    return strings


def _unicode() -> list[str]:
    """Eight characters of each block of the first two planes, and of those beyond that have any."""
    generator = random.Random(2)
    blocks = [*range(0, 0xD800, _BLOCK), *range(0xE000, 0x20000, _BLOCK), 0x20000, 0x2F800, 0x30000, 0xE0000, 0x10FF00]
    characters = [chr(block + generator.randrange(_BLOCK)) for block in blocks for _ in range(8)]
    return ["".join(characters[at : at + 32]) for at in range(0, len(characters), 32)]


def _of_pieces(pieces: Mapping[int, str], decode: Callable[[list[int]], str]) -> list[str]:
    """Pieces put together, cut short, and against themselves, where the order of joining shows."""
    generator = random.Random(3)
    ids = sorted(pieces)
    texts: list[str] = []
    for _ in range(_FROM_VOCABULARY):
        # Byte-level pieces are written in an alphabet of their own; decoding others may take a space from them.
        several = [
            pieces[identity].replace(SPACE_MARK, " ") if SPACE_MARK in pieces[identity] else decode([identity])
            for identity in generator.choices(ids, k=5)
        ]
        piece = max(several, key=len)
        shift = generator.randint(1, max(1, len(piece) - 1))
        halves = several[0][: len(several[0]) // 2] + several[1][len(several[1]) // 2 :]
        texts.append("".join(several) + halves + piece[:shift] + piece + piece[shift:])
    return texts
