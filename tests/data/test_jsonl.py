"""Chunks to texts, and what is said about a bad line: with the fast parser and with the standard one alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import jsonl
from megatron.data.jsonl import BadLine, Chunk, columns_to_content, parse_chunk

FILE = Path("corpus/part3.jsonl")


@pytest.fixture(params=["fast", "standard"], autouse=True)
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "fast":
        pytest.importorskip("orjson")
    else:
        monkeypatch.setattr(jsonl, "_LOADS", None)


def test_texts_come_in_order_and_blank_lines_are_counted() -> None:
    content = b'{"q": "a", "n": 1}\r\n\n  \n{"n": [], "q": "b"}\n{"q": ""}'
    parsed = parse_chunk(Chunk(FILE, 1, content), ["q"])
    assert (parsed.texts, parsed.places, parsed.num_lines, parsed.bad) == ((["a", "b", ""],), [0, 3, 4], 5, [])


def test_a_line_without_one_of_its_keys_gives_no_text_for_any() -> None:
    content = b'{"q": "a", "a": "b"}\n{"q": "c"}\n{"q": "d", "a": "e"}\n'
    parsed = parse_chunk(Chunk(FILE, 1, bytearray(content)), ["q", "a"])
    assert (parsed.texts, parsed.places, parsed.num_lines) == ((["a", "d"], ["b", "e"]), [0, 2], 3)
    assert parsed.bad == [BadLine(1, "no key 'a' (it has 'q')", b'{"q": "c"}', 10)]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "first", "text": "last"}', "last"),
        (b'{"text": "a", "n": NaN, "m": [-Infinity]}', "a"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a"),
        (b'{"text": "a", "n": 1e999}', "a"),
        (b'{"text": "\\ud83d\\ude00 \\u0000", "other": "\\ud800"}', "\U0001f600 \0"),
        (' {"text": "\u00b5g \u65e5\u672c\u2028"} \t\r'.encode(), "\u00b5g \u65e5\u672c\u2028"),
    ],
)
def test_what_is_let_pass(line: bytes, text: str) -> None:
    assert parse_chunk(Chunk(FILE, 1, line), ["text"]).texts == ([text],)


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
        (b'{"text": ' + b"[" * 200_000, "nested too deeply"),
    ],
)
def test_a_bad_line_has_its_place_and_reason(line: bytes, reason: str) -> None:
    parsed = parse_chunk(Chunk(FILE, 41, b'{"text": "fine"}\n\n' + line + b'\n{"text": "good"}\n'), ["text"])
    assert parsed.texts == (["fine", "good"],)
    (bad,) = parsed.bad
    assert (bad.place, bad.raw, bad.num_bytes) == (2, line[:4096], len(line))
    assert reason in bad.reason


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3)
)


@given(rows=st.lists(st.dictionaries(st.sampled_from(["text", "a", "\ud800"]), _JSON), max_size=6), cut=st.integers())
@settings(max_examples=100)
def test_the_fast_parser_changes_nothing(rows: list[dict[str, object]], cut: int) -> None:
    pytest.importorskip("orjson")
    content = b"\n".join(json.dumps(row).encode() for row in rows)
    content = content[: cut % (len(content) + 1)] + b"\xff\n" + content  # a line that is cut short, and one not UTF-8
    import orjson

    outcomes = []
    for loads in (orjson.loads, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jsonl, "_LOADS", loads)
            outcomes.append(parse_chunk(Chunk(FILE, 1, content), ["text"]))
    assert outcomes[0] == outcomes[1]


def test_a_bad_line_is_the_same_alone_or_among_others() -> None:
    for line in (b"[", b'{"text": 1}', b"x" * 4096, b"\xff"):
        (alone,) = parse_chunk(Chunk(FILE, 1, line + b"\n"), ["text"]).bad
        (among,) = parse_chunk(Chunk(FILE, 1, line + b"\n\n"), ["text"]).bad
        assert alone == among and alone.num_bytes == len(line)


def test_columns_are_texts_too() -> None:
    columns = [[b"a", b"", None, b"\xff", "\u00e9".encode()], [b"v", b"w", b"x", b"y", b"z"]]
    parsed = parse_chunk(Chunk(FILE, 7, columns_to_content(columns), columnar=True), ["q", "a"])
    assert (parsed.texts, parsed.places, parsed.num_lines) == ((["a", "", "\u00e9"], ["v", "w", "z"]), [0, 1, 4], 5)
    assert [(bad.place, bad.reason, bad.raw) for bad in parsed.bad] == [
        (2, "the value of 'q' is not text but null", b"x"),
        (3, "not UTF-8 (byte 0xff at position 0)", b"\xff\ny"),
    ]


def test_a_line_that_was_too_long_to_keep_is_bad() -> None:
    parsed = parse_chunk(Chunk(FILE, 1, b'{"te', overlong_bytes=2 << 30), ["text"])
    assert (parsed.texts, parsed.num_lines) == (([],), 1)
    assert parsed.bad[0] == BadLine(0, "longer than the 1,024 MiB that a line may have", b'{"te', 2 << 30)
