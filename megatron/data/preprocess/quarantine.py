"""Bad lines: where they are kept, and how many of them a run may have."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.data.jsonl import BadLine
from megatron.data.preprocess.gaps import open_kept
from megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class BadLineBudget:
    """How many bad lines a run may have: a count, or a share of its lines (blank ones not counted)."""

    text: str
    count: int | None
    share: float

    def is_exceeded(self, bad: int, lines: int) -> bool:
        """Whether `bad` among `lines` that are not blank are too many."""
        return bad > self.count if self.count is not None else bad > self.share * lines

    def is_lost(self, bad: int, most_lines: int | None) -> bool:
        """Whether `bad` are too many whatever follows; `most_lines` are the most that there can be (None: unknown)."""
        if self.count is not None:
            return bad > self.count
        return most_lines is not None and bad > self.share * most_lines


DEFAULT_BUDGET = BadLineBudget("0.1%", None, 0.001)


def parse_budget(text: str) -> BadLineBudget:
    """`100` or `0.1%`. Raises ConfigError for anything else."""
    refusal = f"--max-bad-lines {text}: give a count of lines, as in 100, or a share of them, as in 0.1%"
    try:
        count, share = (None, float(text[:-1]) / 100) if text.endswith("%") else (int(text), 0.0)
    except ValueError as error:
        raise ConfigError(refusal) from error
    if not 0 <= share <= 1 or (count is not None and count < 0):
        raise ConfigError(refusal)
    return BadLineBudget(text, count, share)


class Quarantine:
    """`PREFIX.quarantine.jsonl`: a JSON object for each bad line, in the order of the input.

    `file`, `line` (from 1; with `from_byte` or `from_row`, where a shard's part of the file begins, from there),
    `reason`, `bytes` (the line's length) and `raw`, the first 4 KiB of it, or `raw_base64` if that is not UTF-8. It
    carries a temporary name until `publish`, and is there only if there are bad lines.
    """

    def __init__(self, path: Path, kept_bytes: int = 0) -> None:
        self._path = path
        self.partial = path.with_name(path.name + ".partial")
        self._file = open_kept(self.partial, kept_bytes)

    def add(self, file: Path, line: int, origin: dict[str, int], bad: BadLine) -> None:
        """Keep a bad line; `origin` is empty, or says where line 1 is."""
        content: dict[str, Any] = {"file": str(file), "line": line, **origin, "reason": bad.reason}
        content["bytes"] = bad.num_bytes
        try:
            content["raw"] = bad.raw.decode("utf-8")
        except UnicodeDecodeError:
            content["raw_base64"] = base64.b64encode(bad.raw).decode("ascii")
        self._file.write(json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def flush(self) -> None:
        """Hand what was added to the operating system."""
        self._file.flush()

    def sync(self) -> None:
        """Have on the disk what was flushed. May be called from another thread."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Leave the file as it is."""
        self._file.close()


def publish_quarantine(path: Path, partial: Path) -> None:
    """Give the file its name, or have none where no line is bad; can be done again."""
    if not partial.exists():
        return
    if partial.stat().st_size:
        partial.replace(path)
    else:
        path.unlink(missing_ok=True)
        partial.unlink()
