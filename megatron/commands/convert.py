"""`megatron convert`: from a Hugging Face folder to a checkpoint and back."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.checkpoint.convert import Format

HELP = "convert between Hugging Face folders and sharded checkpoints"

_FORMATS: dict[str, Format] = {"hf": "huggingface", "native": "native"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of a model (Hugging Face's, Meta's), checkpoint or save folder")
    parser.add_argument("destination", metavar="DST", type=Path, help="new folder to write")
    parser.add_argument(
        "--to", choices=("hf", "native"), help="format to write (default: the other one than the source's)"
    )
    parser.add_argument(
        "--tensor", type=int, metavar="N", help="cut native files for N tensor ranks; any grid loads them"
    )
    parser.add_argument("--pipeline", type=int, metavar="N", help="and for N stages; any grid loads any cut")
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
        f"{done.source} -> {done.destination} ({'Hugging Face' if done.format == 'huggingface' else 'native'}): "
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
        self._shown = time.monotonic()

    def show(self, what: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now - self._shown < self._interval_s:
            return
        self._shown = now
        percent = 100 * done_bytes // max(total_bytes, 1)
        text = f"{percent:3d} %  {done_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB  {what}"
        print(f"\r\033[K{text[:100]}" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr)

    def clear(self) -> None:
        """Remove the line, so that what follows stands alone."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr)
