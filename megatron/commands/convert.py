"""`megatron convert`: a model from any format to any other, cut for a grid in the same pass."""

from __future__ import annotations

import argparse
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
    from megatron.utils.progress import ProgressLine
    from megatron.utils.units import format_bytes, format_count, format_duration

    began = time.monotonic()
    line = ProgressLine()
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
