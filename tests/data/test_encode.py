"""A chunk's documents: their beginning and end, those that are empty, and control tokens written out in a text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron.data.encode import Encoding, encode_chunk
from megatron.data.jsonl import Chunk
from megatron.tokenizer import SpecialTokens, load_tokenizer

TEXTS = ["the patient", "", "a</s> b<s>", "x"]


def encode(tiny_tokenizer: Path, **options: object) -> tuple[list[int], list[int]]:
    content = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    encoding = Encoding(tokenizer=tiny_tokenizer, extra_tokens=(), json_keys=("text",), **{"eod_id": None} | options)  # type: ignore[arg-type]
    encoded = encode_chunk(load_tokenizer(tiny_tokenizer), encoding, Chunk(Path("input.jsonl"), 1, content))
    (tokens, sizes), *others = encoded.documents
    assert others == []
    assert tokens.dtype == np.uint16
    assert encoded.num_texts == len(TEXTS)
    return tokens.tolist(), sizes.tolist()


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("eod", [None, 2])
@pytest.mark.parametrize("special", ["text", "ids"])
def test_documents_begin_and_end_as_asked(
    tiny_tokenizer: Path, bos: int | None, eod: int | None, special: SpecialTokens
) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    before, after = [[] if identity is None else [identity] for identity in (bos, eod)]
    documents = [[*before, *tokenizer.encode(text, special), *after] for text in TEXTS if text]
    tokens, sizes = encode(tiny_tokenizer, bos_id=bos, eod_id=eod, special_tokens=special)
    assert sizes == [len(document) for document in documents]
    assert tokens == sum(documents, start=list[int]())


def test_what_a_text_spells_is_no_control_token_by_default(tiny_tokenizer: Path) -> None:
    assert not {1, 2} & set(encode(tiny_tokenizer)[0])
    assert {1, 2} <= set(encode(tiny_tokenizer, special_tokens="ids")[0])
