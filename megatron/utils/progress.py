"""A line that says how far a long piece of work is."""

from __future__ import annotations

import sys
import time

from megatron.utils.units import format_duration


class ProgressLine:
    """On standard error: one line that rewrites itself on a terminal, and one line in ten seconds elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._interval_s = 0.1 if self._terminal else 10.0
        self._shown = self._began = time.monotonic()
        self._first_bytes: int | None = None  # what was done before counts for no speed

    def show(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Say how far it is, if the last time is long enough ago."""
        now = time.monotonic()
        if self._first_bytes is None:
            self._first_bytes, self._began = done_bytes, now
        if now - self._shown < self._interval_s:
            return
        self._shown = now
        percent = 100 * done_bytes // max(total_bytes, 1)
        left = self._left(now, done_bytes, total_bytes)
        text = f"{percent:3d} %  {done_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB{left}  {what}"
        sys.stderr.write(f"\r\033[K{text[:100]}" if self._terminal else text + "\n")
        sys.stderr.flush()

    def clear(self) -> None:
        """Remove the line, so that what follows stands alone."""
        if self._terminal:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    def _left(self, now: float, done_bytes: int, total_bytes: int) -> str:
        """How long the rest takes at the speed so far."""
        moved = done_bytes - (self._first_bytes or 0)
        if not moved:
            return ""
        return f", {format_duration((total_bytes - done_bytes) * (now - self._began) / moved)} left"
