"""Messages for people: one logger tree, plain lines on stderr.

Standard output belongs to results (the JSON line of `evaluate`), so nothing is ever logged there.
"""

from __future__ import annotations

import logging
import sys

ROOT = "megatron"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: pass `__name__`. It is quiet below WARNING until `configure_logging` has run."""
    return logging.getLogger(name if name == ROOT or name.startswith(ROOT + ".") else f"{ROOT}.{name}")


def configure_logging(rank: int) -> None:
    """Send messages to stderr: INFO and above from rank 0, WARNING and above from the others, which say who they are.

    Calling it again replaces what the first call set up.
    """
    logger = logging.getLogger(ROOT)
    for handler in [handler for handler in logger.handlers if isinstance(handler, _StderrHandler)]:
        logger.removeHandler(handler)
    handler = _StderrHandler()
    handler.setFormatter(_PlainFormatter(rank))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


class _StderrHandler(logging.Handler):
    """Writes to whatever `sys.stderr` is at the time, so that redirections made later are honoured."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class _PlainFormatter(logging.Formatter):
    """`the message` on rank 0, `warning: the message` for what needs attention, `rank 3: …` elsewhere."""

    def __init__(self, rank: int) -> None:
        super().__init__("%(message)s")
        self._prefix = "" if rank == 0 else f"rank {rank}: "

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self._prefix}{level}{super().format(record)}"
