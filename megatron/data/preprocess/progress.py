"""How far the work is and how fast it goes: one line that is updated on a terminal, else a line every ten seconds."""

from __future__ import annotations

import shutil
import sys
import time

from megatron.utils.logging import get_logger
from megatron.utils.units import format_bytes, format_count, format_duration

_LOGGER = get_logger(__name__)
_LOG_EVERY_S = 10.0
_REDRAW_EVERY_S = 0.2
_BAR_CELLS = 24
_LEAST_BAR_CELLS = 5


class Progress:
    """Counts what is done. `total_bytes` of the files are to be read (None: unknown), `begun_bytes` were before.

    Rates are those of this process: megabytes of text, and tokens, per second.
    """

    def __init__(self, total_bytes: int | None, begun_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._begun_bytes = self._done_bytes = begun_bytes
        self._text_bytes = 0
        self._tokens = 0
        self._on_terminal = sys.stderr.isatty()
        self._start_s = self._told_s = time.monotonic()

    def add(self, done_bytes: int, text_bytes: int, tokens: int) -> None:
        """`done_bytes` of the files are done in all; more text and more tokens came with them."""
        self._done_bytes = done_bytes
        self._text_bytes += text_bytes
        self._tokens += tokens
        now_s = time.monotonic()
        if now_s - self._told_s >= (_REDRAW_EVERY_S if self._on_terminal else _LOG_EVERY_S):
            self._told_s = now_s
            if self._on_terminal:
                sys.stderr.write(f"\r{self._bar(now_s, shutil.get_terminal_size().columns - 1)}\x1b[K")
                sys.stderr.flush()
            else:
                _LOGGER.info("%s", self._line(now_s))

    def clear(self) -> None:
        """Remove the line that is updated, so that others can be written."""
        if self._on_terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def summary(self) -> str:
        """What was done in all, at the end."""
        now_s = time.monotonic()
        return f"read {format_bytes(self._text_bytes)} of text in {format_duration(now_s - self._start_s)}: " + (
            self._rates(now_s)
        )

    def _line(self, now_s: float) -> str:
        tokens = f"{format_count(self._tokens)} tokens"
        if not self._total_bytes:
            return f"{format_bytes(self._done_bytes)}, {tokens}, {self._rates(now_s)}"
        of = f"{format_bytes(self._done_bytes)} of {format_bytes(self._total_bytes)} ({100 * self._share:.0f} %)"
        return f"{of}, {tokens}, {self._rates(now_s)}{self._left(now_s)}"

    def _bar(self, now_s: float, columns: int) -> str:
        if not self._total_bytes:
            return self._line(now_s)[:columns]
        of = f"{100 * self._share:.0f} % of {format_bytes(self._total_bytes)}"
        text = f"{of}, {self._rates(now_s)}{self._left(now_s)}"
        cells = min(_BAR_CELLS, columns - len(text) - len("[] "))
        filled = int(self._share * cells)
        return (f"[{'#' * filled}{'.' * (cells - filled)}] " if cells >= _LEAST_BAR_CELLS else "") + text[:columns]

    @property
    def _share(self) -> float:
        return min(1.0, self._done_bytes / (self._total_bytes or 1))

    def _left(self, now_s: float) -> str:
        done_here = self._done_bytes - self._begun_bytes
        if self._total_bytes is None or done_here <= 0:
            return ""
        left_s = (now_s - self._start_s) * (self._total_bytes - self._done_bytes) / done_here
        return f", about {format_duration(max(0.0, left_s))} left"

    def _rates(self, now_s: float) -> str:
        elapsed_s = max(now_s - self._start_s, 1e-9)
        return f"{self._text_bytes / elapsed_s / 1e6:.1f} MB/s, {format_count(self._tokens / elapsed_s)} tokens/s"
