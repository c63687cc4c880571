"""Lines to texts, and what is said about a bad one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.jsonl import Chunk, ReadFile, parse_texts, read_chunks
from megatron.utils.errors import DataError


def texts_of(path: Path, chunk_bytes: int, *keys: str) -> list[tuple[str, ...]]:
    return [texts for chunk in read_chunks(path, lambda _: None, chunk_bytes) for texts in parse_texts(chunk, keys)]


@given(texts=st.lists(st.text(st.characters(codec="utf-8")), max_size=20), chunk_bytes=st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_texts_come_whole_and_in_order_however_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], chunk_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_bytes(b"\n".join(json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts))
    assert texts_of(path, chunk_bytes, "text") == [(text,) for text in texts]


def test_what_was_read_is_told_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    told: list[ReadFile] = []
    chunks = list(read_chunks(path, told.append, 4))
    assert [texts for chunk in chunks for texts in parse_texts(chunk, ["text"])] == [("a",), ("b",)]
    assert [chunk.first_line for chunk in chunks] == [1, 2]
    assert told == [ReadFile(path, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b"just words", "not JSON"),
        (b'{"text": "a\xff"}', "not UTF-8 (byte 0xff at position 11)"),
        (b'["text"]', "not a JSON object but a list"),
        (b'"text"', "not a JSON object but text"),
        (b'{"body": "a", "id": 3}', "no key 'text' (it has 'body', 'id')"),
        (b"{}", "no key 'text' (it has none)"),
        (b'{"text": null}', "the value of 'text' is not text but null"),
        (b'{"text": 3}', "not text but a number"),
        (b'{"text": true}', "not text but true or false"),
        (b'{"text": ["a"]}', "not text but a list"),
        (b'{"text": "a\\ud800b"}', "half of a surrogate pair (\\ud800)"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"text": ' + b"[" * 200_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named_with_file_number_and_reason(line: bytes, reason: str) -> None:
    chunk = Chunk(Path("corpus/part3.jsonl"), 41, b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        list(parse_texts(chunk, ["text"]))
    assert str(error.value).startswith("corpus/part3.jsonl, line 43: ")
    assert reason in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.jsonl cannot be read: No such file"):
        next(read_chunks(tmp_path / "gone.jsonl", lambda _: None))
