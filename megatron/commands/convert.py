"""`megatron convert`: a model from any format to any other, cut for a grid in the same pass."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.checkpoint.source import Format

HELP = "convert a model between Hugging Face's, Meta's, Megatron-LLM's and our own format"

_FORMATS: dict[str, Format] = {
    "hf": "huggingface",
    "native": "native",
    "meta": "meta",
    "megatron-llm": "megatron-llm",
}
_TITLES = {"huggingface": "Hugging Face", "native": "native", "meta": "Meta", "megatron-llm": "Megatron-LLM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of a model in any format, or save folder")
    parser.add_argument("destination", metavar="DST", type=Path, help="new folder to write")
    parser.add_argument(
        "--to", choices=tuple(_FORMATS), help="format to write (default: native; hf where the source is native)"
    )
    parser.add_argument(
        "--tensor", type=int, metavar="N", help="cut the files for N tensor ranks (native ones load on any grid)"
    )
    parser.add_argument("--pipeline", type=int, metavar="N", help="and for N stages")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp16", "fp64"), help="cast the weights (default: keep)")


def run(arguments: argparse.Namespace) -> int:
    """Convert, with a progress line on stderr and a summary at the end. Raises MegatronError."""
    from megatron.checkpoint.convert import DTYPES, convert
    from megatron.utils.units import format_bytes, format_count, format_duration

    began = time.monotonic()
    line = _ProgressLine()
    try:
        done = convert(
            arguments.source,
            arguments.destination,
            to=_FORMATS.get(arguments.to),
            tensor=arguments.tensor,
            pipeline=arguments.pipeline,
            dtype=DTYPES.get(arguments.dtype),
            progress=line.show,
        )
    finally:
        line.clear()
    seconds = time.monotonic() - began
    print(
        f"{done.source} -> {done.destination} ({_TITLES[done.format]}): "
        f"{done.tensors} tensors, {format_count(done.parameters)} parameters, {format_bytes(done.size_bytes)} in "
        f"{done.files} {'file' if done.files == 1 else 'files'}, {format_duration(seconds)}"
    )
    for part in done.left_out:
        print(f"Not carried over: {part}.")
    return 0


class _ProgressLine:
    """One line that rewrites itself on a terminal, and one line in ten seconds elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._interval_s = 0.1 if self._terminal else 10.0
        self._shown = self._began = time.monotonic()
        self._first_bytes: int | None = None  # what an earlier run had done counts for no speed

    def show(self, what: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now - self._shown < self._interval_s:
            return
        self._shown = now
        if self._first_bytes is None:
            self._first_bytes, self._began = done_bytes, now
        percent = 100 * done_bytes // max(total_bytes, 1)
        left = self._left(now, done_bytes, total_bytes)
        text = f"{percent:3d} %  {done_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB{left}  {what}"
        print(f"\r\033[K{text[:100]}" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr)

    def _left(self, now: float, done_bytes: int, total_bytes: int) -> str:
        """How long the rest takes at the speed so far."""
        from megatron.utils.units import format_duration

        moved = done_bytes - (self._first_bytes or 0)
        if not moved:
            return ""
        return f", {format_duration((total_bytes - done_bytes) * (now - self._began) / moved)} left"

    def clear(self) -> None:
        """Remove the line, so that what follows stands alone."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr)
