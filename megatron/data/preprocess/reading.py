"""The lines of a source in chunks, from any position on. This module must not know what becomes of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron.data.jsonl import MAX_LINE_BYTES, Chunk, columns_to_content
from megatron.data.preprocess.archives import TextStream, import_pyarrow
from megatron.data.preprocess.inputs import STANDARD_INPUT, Source
from megatron.utils.errors import DataError
from megatron.utils.files import sha256_file

CHUNK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_ROWS = 4096
_KEPT_OF_OVERLONG_BYTES = 1 << 16
# Pages are read one by one, not whole row groups.
_PARQUET = {"buffer_size": 1 << 20, "pre_buffer": False, "page_checksum_verification": True}


@dataclass(frozen=True)
class Position:
    """How far a source is read: `offset` bytes of text (from the file's beginning) or rows, `lines` since its `begin`.

    `raw_bytes` tells progress: how many bytes of the file that took.
    """

    offset: int
    lines: int
    raw_bytes: int


@dataclass(frozen=True)
class ReadSource:
    """What was read of a source that has been read to its end: bytes of the file, their SHA-256, bytes of text."""

    num_bytes: int
    sha256: str


def start_of(source: Source) -> Position:
    """Where reading a source begins."""
    return Position(source.begin, 0, 0)


def read_chunks(
    source: Source,
    keys: Sequence[str],
    position: Position,
    done: Callable[[ReadSource], None],
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[tuple[Chunk, Position]]:
    """The lines of a source from a position on, in chunks of about `chunk_bytes`, each with the position behind it.

    `done` is then told what was read of the source in all. A longer line is a chunk of its own. Raises DataError for
    what cannot be read.
    """
    if source.kind == "parquet":
        yield from _read_parquet(source, keys, position, done, chunk_bytes)
        return
    name = "standard input" if source.file == STANDARD_INPUT else str(source.file)
    with _open(source.file) as file:
        stream = TextStream(file, name, source.begin, source.end)
        stream.skip(position.offset - source.begin)
        for content, overlong_bytes, num_lines in _cut(stream, chunk_bytes):
            first_line = position.lines + 1
            position = Position(
                position.offset + (overlong_bytes or len(content)), position.lines + num_lines, stream.raw_bytes
            )
            if first_line == 1 and source.begin == 0:
                content = content.removeprefix(_BYTE_ORDER_MARK)
            yield Chunk(source.file, first_line, content, overlong_bytes=overlong_bytes), position
        done(ReadSource(stream.raw_bytes, stream.sha256))


@contextmanager
def _open(file: Path) -> Iterator[BinaryIO]:
    if file == STANDARD_INPUT:
        if sys.stdin is None:
            raise DataError("standard input is closed; pipe something in, or name files with --input")
        yield sys.stdin.buffer
        return
    try:
        stream = open(file, "rb", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    with stream:
        yield cast(BinaryIO, stream)


def _cut(stream: TextStream, chunk_bytes: int) -> Iterator[tuple[bytes | bytearray, int, int]]:
    """Whole lines: (content, 0, number of lines), or (beginning, length, 1) for a line over MAX_LINE_BYTES.

    A line longer than `chunk_bytes` comes alone.
    """
    pending: bytes | bytearray = b""
    dropped = 0  # bytes of an overlong line that are not kept
    end = 0  # behind the last line break in `pending`
    while block := stream.read(chunk_bytes):
        if not pending:
            pending = block  # no copy where blocks end with lines
        elif not end and len(pending) > chunk_bytes:
            if not isinstance(pending, bytearray):
                pending = bytearray(pending)  # grows in place, so a long line is in memory once
            pending += block
        else:
            pending = b"".join((pending, block))
        end = max(end, pending.rfind(b"\n", len(pending) - len(block)) + 1)
        if not end and len(pending) > MAX_LINE_BYTES:
            dropped += len(pending) - _KEPT_OF_OVERLONG_BYTES
            pending = pending[:_KEPT_OF_OVERLONG_BYTES]
        while end and (dropped or len(pending) >= chunk_bytes):
            first = pending.find(b"\n") + 1
            cut = first if dropped or first > chunk_bytes else end
            rest = bytes(memoryview(pending)[cut:])
            if isinstance(pending, bytearray):
                del pending[cut:]
            else:
                pending = pending[:cut]
            yield _piece(pending, dropped)
            pending, dropped = rest, 0
            end = pending.rfind(b"\n") + 1
    if pending:
        yield _piece(pending, dropped)


def _piece(content: bytes | bytearray, dropped: int) -> tuple[bytes | bytearray, int, int]:
    num_lines = content.count(b"\n") + (not content.endswith(b"\n"))
    if num_lines == 1 and dropped + len(content) > MAX_LINE_BYTES:
        return bytes(content[:_KEPT_OF_OVERLONG_BYTES]), dropped + len(content), 1
    return content, 0, num_lines


def _read_parquet(
    source: Source, keys: Sequence[str], position: Position, done: Callable[[ReadSource], None], chunk_bytes: int
) -> Iterator[tuple[Chunk, Position]]:
    pyarrow = import_pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(source.file, **_PARQUET) as file:
            _check_columns(source.file, file.schema_arrow, keys, pyarrow)
            rows = file.metadata.num_rows
            end = rows if source.end is None else source.end
            for first_row, columns in _batches(file, keys, position.offset, end, chunk_bytes, pyarrow):
                content = columns_to_content(columns)
                offset = first_row + len(columns[0])
                first_line = first_row - source.begin + 1
                position = Position(offset, offset - source.begin, source.num_bytes * (offset - source.begin) // rows)
                yield Chunk(source.file, first_line, content, columnar=True), position
        done(ReadSource(source.num_bytes, sha256_file(source.file)))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # what it meets in damaged files
        raise DataError(
            f"{source.file} cannot be read as parquet after row {position.offset:,} ({_first_line(error)}); copy or "
            "make it again"
        ) from error


def _batches(
    file: Any, keys: Sequence[str], begin: int, end: int, chunk_bytes: int, pyarrow: Any
) -> Iterator[tuple[int, list[list[bytes | None]]]]:
    """(first row, the texts of each key) of the rows `begin … end`, about `chunk_bytes` at a time."""
    group_end = 0
    for group in range(file.metadata.num_row_groups):
        metadata = file.metadata.row_group(group)
        row, group_end = group_end, group_end + metadata.num_rows
        if group_end <= begin or row >= end:
            continue
        # Not those of the columns alone: pyarrow ends the process where it is asked for a column's damaged metadata.
        batch_rows = max(1, min(_MAX_ROWS, chunk_bytes * metadata.num_rows // max(1, metadata.total_byte_size)))
        for batch in file.iter_batches(batch_rows, row_groups=[group], columns=list(keys)):
            if row + batch.num_rows > group_end:
                break
            first, last = max(begin, row), min(end, row + batch.num_rows)
            if first < last:
                part = batch.slice(first - row, last - first)
                yield first, [part.column(key).cast(pyarrow.large_binary()).to_pylist() for key in keys]
            row += batch.num_rows
        if row != group_end:
            raise ValueError(f"row group {group} does not have the {metadata.num_rows:,} rows that it should")
    if group_end != file.metadata.num_rows:
        raise ValueError(f"there are {group_end:,} rows, not {file.metadata.num_rows:,}")


def _check_columns(file: Path, schema: Any, keys: Sequence[str], pyarrow: Any) -> None:
    for key in keys:
        if key not in schema.names:
            raise DataError(
                f"{file} has no column {key!r} (it has {', '.join(map(repr, schema.names[:8]))}); name one with "
                "--json-keys"
            )
        if schema.names.count(key) > 1:
            raise DataError(f"{file} has several columns {key!r}; rename all but one")
        kind = schema.field(key).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        texts = (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary())
        if kind not in texts:
            raise DataError(f"{file}: the column {key!r} is not text but {kind}; name another with --json-keys")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
