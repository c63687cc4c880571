"""JSON lines: from chunks of lines to texts, and what is wrong with a line.

The rules: a line is a JSON object in UTF-8 with a text under each key. Where a key is given twice the last one counts;
`NaN`, `Infinity` and numbers of any length are let pass, since only texts are used. Blank lines (white space alone)
are passed over. Everything else is a bad line. This module must not know where lines come from, nor what becomes of
the texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
Line = bytes | bytearray

MAX_LINE_BYTES = 1 << 30
_KEPT_RAW_BYTES = 4096
_KEPT_REASON_CHARACTERS = 500


def _fast_loads() -> Callable[[Any], Any] | None:
    """orjson's parser where it is installed.

    What it accepts, the standard parser accepts with the same texts; what it refuses is given to the standard one.
    """
    try:
        import orjson
    except ImportError:
        return None
    return orjson.loads


_LOADS = _fast_loads()
_NOT_GOOD = (ValueError, KeyError, TypeError, IndexError)  # not JSON, no such key, no object


@dataclass(frozen=True)
class Chunk:
    """Whole lines of one file; `first_line` counts from 1.

    `content` is the lines' bytes, or, if `columnar`, texts as `columns_to_content` lays them out. A line that was too
    long to be kept is a chunk of its own: its `overlong_bytes` is its length, `content` its beginning.
    """

    file: Path
    first_line: int
    content: bytes | bytearray
    columnar: bool = False
    overlong_bytes: int = 0


@dataclass(frozen=True)
class BadLine:
    """A line that gives no texts: its place in the chunk (from 0), why, its beginning, and its length."""

    place: int
    reason: str
    raw: bytes
    num_bytes: int


@dataclass(frozen=True)
class ParsedChunk:
    """A chunk's texts: per key those of its good lines, and the place (from 0) of each good line.

    `num_lines` counts all lines, blank and bad ones included.
    """

    texts: tuple[list[str], ...]
    places: list[int]
    num_lines: int
    bad: list[BadLine]


def parse_chunk(chunk: Chunk, keys: Sequence[str]) -> ParsedChunk:
    """The texts under `keys` of every good line, and the bad lines with their reasons."""
    if chunk.columnar:
        return _parse_columns(chunk, keys)
    if _LOADS is not None and not chunk.overlong_bytes:
        parsed = _parse_good(chunk.content, keys, _LOADS)
        if parsed is not None:
            return parsed
    rows, places, num_lines, bad = take_lines(chunk, lambda line: _texts(line, keys))
    columns = tuple([row[at] for row in rows] for at in range(len(keys)))
    return ParsedChunk(columns, places, num_lines, bad)


def _parse_good(content: Line, keys: Sequence[str], loads: Callable[[Any], Any]) -> ParsedChunk | None:
    """What `parse_chunk` gives of lines that are all good, with no Python work for each; None if one is not."""
    try:
        rows = list(map(loads, _lines(content)))
        columns = tuple([row[key] for row in rows] for key in keys)
    except _NOT_GOOD:
        return None
    if any(set(map(type, column)) - {str} for column in columns):
        return None
    return ParsedChunk(columns, list(range(len(rows))), len(rows), [])


def take_lines(chunk: Chunk, take: Callable[[Line], T]) -> tuple[list[T], list[int], int, list[BadLine]]:
    """What `take` makes of each line of a chunk that is not columnar; the places of these; the number of all lines; and
    the bad ones, for which it raises RefusedLine."""
    if chunk.overlong_bytes:
        reason = f"longer than the {MAX_LINE_BYTES >> 20:,} MiB that a line may have"
        return [], [], 1, [BadLine(0, reason, bytes(chunk.content[:_KEPT_RAW_BYTES]), chunk.overlong_bytes)]
    taken, places, bad, num_lines = list[T](), list[int](), list[BadLine](), 0
    for line in _lines(chunk.content):
        place, num_lines = num_lines, num_lines + 1
        if not line or line.isspace():
            continue
        try:
            taken.append(take(line))
            places.append(place)
        except RefusedLine as error:
            bad.append(bad_line(place, error, line))
    return taken, places, num_lines, bad


def bad_line(place: int, error: RefusedLine, line: Line) -> BadLine:
    """What is kept of a line that was refused."""
    raw = bytes(line[:_KEPT_RAW_BYTES]).rstrip(b"\n")
    return BadLine(place, str(error)[:_KEPT_REASON_CHARACTERS], raw, len(line) - line.endswith(b"\n"))


def columns_to_content(columns: Sequence[Sequence[bytes | None]]) -> bytes:
    """Texts (UTF-8, or None for a missing one) as the content of a columnar chunk: one sequence per key, equally long.

    i64 number of rows; per column i64 lengths (-1: missing); then per column the bytes back to back.
    """
    rows = len(columns[0])
    lengths = [np.array([-1 if text is None else len(text) for text in column], "<i8") for column in columns]
    texts = [b"".join(text for text in column if text is not None) for column in columns]
    return b"".join([np.array([rows], "<i8").tobytes(), *(length.tobytes() for length in lengths), *texts])


def _parse_columns(chunk: Chunk, keys: Sequence[str]) -> ParsedChunk:
    content = memoryview(chunk.content)
    rows = int(np.frombuffer(content, "<i8", 1)[0])
    lengths = np.frombuffer(content, "<i8", rows * len(keys), 8).reshape(len(keys), rows)
    at = [8 + lengths.nbytes + int(np.maximum(lengths[:column], 0).sum()) for column in range(len(keys))]
    texts: tuple[list[str], ...] = tuple([] for _ in keys)
    places, bad = [], []
    for row, row_lengths in enumerate(lengths.T.tolist()):
        raw = [None if size < 0 else content[begin : begin + size] for begin, size in zip(at, row_lengths, strict=True)]
        at = [begin + max(0, size) for begin, size in zip(at, row_lengths, strict=True)]
        try:
            values = [_text_of_column(value, key) for value, key in zip(raw, keys, strict=True)]
        except RefusedLine as error:
            joined = b"\n".join(bytes(value[:_KEPT_RAW_BYTES]) for value in raw if value is not None)
            bad.append(BadLine(row, str(error), joined[:_KEPT_RAW_BYTES], sum(max(0, size) for size in row_lengths)))
            continue
        places.append(row)
        for column, value in zip(texts, values, strict=True):
            column.append(value)
    return ParsedChunk(texts, places, rows, bad)


def _text_of_column(raw: memoryview | None, key: str) -> str:
    if raw is None:
        raise RefusedLine(f"the value of {key!r} is not text but null")
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from error


def _lines(content: bytes | bytearray) -> Iterable[bytes | bytearray]:
    """The lines, without a copy (but with its line break) where there is only one, which may be very long."""
    if not content:
        return []
    first_end = content.find(b"\n")
    if first_end in (-1, len(content) - 1):
        return [content]
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()  # what follows the last line break is no line
    return lines


class RefusedLine(Exception):
    """The reason why a line is refused."""


def _texts(line: Line, keys: Sequence[str]) -> tuple[str, ...]:
    if _LOADS is not None:
        try:
            content = _LOADS(line)
            texts = tuple([content[key] for key in keys])
        except _NOT_GOOD:
            return _texts_slowly(line, keys)
        if all(type(text) is str for text in texts):
            return texts
    return _texts_slowly(line, keys)


def _texts_slowly(line: bytes | bytearray, keys: Sequence[str]) -> tuple[str, ...]:
    """The reference, which also says what is wrong."""
    content = parse_object(line)
    return tuple(text_under(content, key) for key in keys)


def parse_object(line: Line) -> dict[str, Any]:
    """The JSON object in a line. Raises RefusedLine for anything else."""
    try:
        content = json.loads(line.decode("utf-8").removesuffix("\n"), parse_int=_whole_number)
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from error
    except ValueError as error:
        raise RefusedLine(f"not JSON ({error})") from error
    except RecursionError as error:
        raise RefusedLine("not JSON that can be read (nested too deeply)") from error
    if not isinstance(content, dict):
        raise RefusedLine(f"not a JSON object but {kind_of(content)}")
    return content


def _whole_number(digits: str) -> int | float:
    """As a float where there are thousands of digits, which would be refused."""
    return int(digits) if len(digits) < 4000 else float(digits)


def _not_utf8(error: UnicodeDecodeError) -> RefusedLine:
    return RefusedLine(f"not UTF-8 (byte {error.object[error.start]:#04x} at position {error.start})")


def text_under(content: Mapping[str, Any], key: str) -> str:
    """The text under a key of a JSON object. Raises RefusedLine where there is none."""
    if key not in content:
        raise RefusedLine(f"no key {key!r} (it has {', '.join(map(repr, list(content)[:8])) or 'none'})")
    text = content[key]
    if not isinstance(text, str):
        raise RefusedLine(f"the value of {key!r} is not text but {kind_of(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RefusedLine(
            f"the value of {key!r} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is not text"
        ) from error
    return text


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names[type(value)]
