"""JSON lines: from files to chunks of lines, from lines to texts, and what is wrong with a line.

This module must not know what becomes of the texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.utils.errors import DataError

CHUNK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Chunk:
    """Whole lines of one file, as bytes; `first_line` counts from 1."""

    file: Path
    first_line: int
    content: bytes


@dataclass(frozen=True)
class ReadFile:
    """What was read of a file that has been read to its end."""

    file: Path
    num_bytes: int
    sha256: str


def read_chunks(file: Path, done: Callable[[ReadFile], None], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """The lines of a file in chunks of about `chunk_bytes`; then `done` is told what was read."""
    digest = hashlib.sha256()
    first_line, num_bytes = 1, 0
    try:
        with open(file, "rb") as stream:
            while lines := stream.readlines(chunk_bytes):
                content = b"".join(lines)
                digest.update(content)
                num_bytes += len(content)
                yield Chunk(file, first_line, content.removeprefix(_BYTE_ORDER_MARK) if first_line == 1 else content)
                first_line += len(lines)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    done(ReadFile(file, num_bytes, digest.hexdigest()))


def parse_texts(chunk: Chunk, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The texts of each line under `keys`. Blank lines are passed over.

    Raises DataError with the file, the line's number and the reason for a line that is not a JSON object in UTF-8
    with a text under each key.
    """
    for number, line in enumerate(chunk.content.split(b"\n"), start=chunk.first_line):
        if line.isspace() or not line:
            continue
        try:
            yield _texts(line, keys)
        except _BadLine as error:
            raise DataError(
                f"{chunk.file}, line {number}: {error}; every line must be a JSON object with a text under "
                f"{', '.join(map(repr, keys))}"
            ) from error


class _BadLine(Exception):
    """The reason why a line is refused."""


def _texts(line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    try:
        content = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadLine(f"not UTF-8 (byte {error.object[error.start]:#04x} at position {error.start})") from error
    except ValueError as error:  # JSONDecodeError, and Python's limit on the digits of an integer
        raise _BadLine(f"not JSON ({error})") from error
    except RecursionError as error:
        raise _BadLine("not JSON that can be read (nested too deeply)") from error
    if not isinstance(content, dict):
        raise _BadLine(f"not a JSON object but {_kind(content)}")
    return tuple(_text(content, key) for key in keys)


def _text(content: dict[str, object], key: str) -> str:
    if key not in content:
        raise _BadLine(f"no key {key!r} (it has {', '.join(map(repr, list(content)[:8])) or 'none'})")
    text = content[key]
    if not isinstance(text, str):
        raise _BadLine(f"the value of {key!r} is not text but {_kind(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadLine(
            f"the value of {key!r} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is not text"
        ) from error
    return text


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names[type(value)]
