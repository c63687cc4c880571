"""A tokenizer as a `tokenizer.json` that a faster engine may read, or the reason why there is none that is exact.

What makes such a form exact is checked here as far as it can be told from the tokenizer; the self-test at start
(self_test.py) then holds the engine itself to the tokenizer's own library.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron.tokenizer.model_file import ModelFile, PieceKind

SPACE_MARK = "\u2581"  # how SentencePiece writes a space


class NoForm(Exception):
    """The reason why a tokenizer has no form that gives its own library's ids."""


@dataclass(frozen=True)
class Form:
    """A tokenizer for a faster engine.

    `content` is a tokenizer.json in which every text is text; texts in which one of `library_only` occurs are to be
    encoded by the tokenizer's own library; `removes_extra_spaces` tells that spaces at both ends and all but one of
    each run are to be taken away first, as the library does.
    """

    content: str
    library_only: tuple[str, ...] = ()
    removes_extra_spaces: bool = False


_SPACE_RUN = re.compile(" {2,}")


def without_extra_spaces(text: str) -> str:
    """A text as SentencePiece sees it under `remove_extra_whitespaces`, where its mark is a space at the end only."""
    return _SPACE_RUN.sub(" ", text.lstrip(" ")).rstrip(" " + SPACE_MARK)


def sentencepiece_form(model: ModelFile) -> Form:
    """The form of a SentencePiece BPE model. Raises NoForm.

    SentencePiece joins the neighbours whose join has the highest score, the leftmost of equals (bpe_model.cc); a
    tokenizer.json ranks pairs. The two agree if no two pieces have one score, runs of spaces aside, which grow from
    the left in both: for them the pair with the longer left part ranks first.
    """
    _check_sentencepiece(model)
    joined = {text: model.pieces[identity].score for text, identity in model.of_kind(PieceKind.NORMAL).items()}
    merges = [
        (score, cut, piece)
        for piece, score in joined.items()
        for cut in range(1, len(piece))
        if piece[:cut] in joined and piece[cut:] in joined
    ]
    merges.sort(reverse=True)
    unknown = next(iter(model.of_kind(PieceKind.UNKNOWN)))
    normalizers = [
        {"type": "Prepend", "prepend": SPACE_MARK},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
    ]
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": normalizers[not model.adds_leading_space :]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text: identity for identity, piece in enumerate(model.pieces)},
            "merges": [[piece[:cut], piece[cut:]] for _, cut, piece in merges],
        },
    }
    return Form(
        json.dumps(content),
        library_only=tuple(model.of_kind(PieceKind.USER_DEFINED)),
        removes_extra_spaces=model.removes_extra_spaces,
    )


def _check_sentencepiece(model: ModelFile) -> None:
    texts, symbols = model.of_kind(PieceKind.NORMAL), model.of_kind(PieceKind.USER_DEFINED)
    scores = Counter(model.pieces[identity].score for text, identity in texts.items() if text.strip(SPACE_MARK))
    reasons = {
        "it is not a BPE model": not model.is_bpe,
        "it has no byte pieces": not model.byte_fallback or len(model.of_kind(PieceKind.BYTE)) != 256,
        "it changes characters before it encodes": model.has_character_map,
        "it marks spaces in another way": model.space_as_suffix or not model.marks_spaces,
        "it has unused pieces": bool(model.of_kind(PieceKind.UNUSED)),
        "it has pieces of equal score": any(count > 1 for count in scores.values()),
        "it has pieces with characters that are no pieces": not set("".join(texts)) <= texts.keys(),
        "it defines symbols with spaces": any({" ", SPACE_MARK} & set(symbol) for symbol in symbols),
        "it has pieces twice": len({piece.text for piece in model.pieces}) < len(model.pieces),
    }
    if found := [reason for reason, applies in reasons.items() if applies]:
        raise NoForm(found[0])


def hugging_face_form(content: str | bytes) -> Form:
    """The form of a tokenizer.json: without its special tokens, which are text where they occur. Raises NoForm."""
    whole: dict[str, Any] = json.loads(content)
    if whole.get("model", {}).get("type", "BPE") != "BPE":
        raise NoForm(f"it is a {whole['model']['type']} model, not a BPE model")
    plain = [token for token in whole.get("added_tokens") or [] if not token.get("special")]
    if plain and whole.get("normalizer") is not None:
        raise NoForm("it has added tokens that are no special tokens")
    whole |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return Form(json.dumps(whole), library_only=tuple(token["content"] for token in plain))


def pattern_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Where any of the tokens occurs, the first named where two start at the same place; None without tokens."""
    pattern = "|".join(map(re.escape, tokens))
    return re.compile(f"({pattern})") if pattern else None
