"""Stopping together: signals, the stop file and the configuration make a wish, a vote makes it everybody's decision.

The vote is taken while a GPU still computes the step, so it holds nothing up; all ranks stop after the same step.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from megatron.utils.environment import process_age_s
from megatron.utils.logging import get_logger

_logger = get_logger(__name__)

STOP_FILE = "STOP"
# Launchers pass a Ctrl-C on that the terminal already delivered: only a later one means "at once".
_SAME_WISH_S = 5.0


class StopWish:
    """Whether this process was asked to stop: by SIGTERM, Ctrl-C or, on the rank that looks for it, the stop file; by
    the configuration after every `exit_interval`-th step, and after `exit_minutes` of this process's life.
    """

    def __init__(
        self, stop_file: Path | None, exit_interval: int | None = None, exit_minutes: float | None = None
    ) -> None:
        self._stop_file, self._exit_interval, self._exit_minutes = stop_file, exit_interval, exit_minutes
        self._began_s = time.monotonic() - process_age_s()
        self._signalled_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self.reason = ""

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wanted(self, step: int) -> bool:
        """Whether to stop after `step`, the present one."""
        if self.reason == "" and self._exit_interval is not None and step % self._exit_interval == 0:
            self.reason = f"train.exit_interval={self._exit_interval}"
        if self.reason == "" and self._exit_minutes is not None:
            minutes = (time.monotonic() - self._began_s) / 60
            if minutes > self._exit_minutes:
                self.reason = f"train.exit_minutes={self._exit_minutes:g} are over"
        if self.reason == "" and self._stop_file is not None and self._stop_file.exists():
            self.reason = f"found {self._stop_file}"
            # It has been heard; left there it would stop the next start as well.
            _remove(self._stop_file)
        return self.reason != ""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
            self.reason = f"received {signal.Signals(number).name}"
        elif number == signal.SIGINT and now - self._signalled_at > _SAME_WISH_S:
            raise KeyboardInterrupt


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        _logger.warning("%s cannot be removed (%s); the next start will stop at once", path, error.strerror or error)
