"""`megatron preprocess`: tokenize JSON lines into Megatron's `.bin/.idx` pairs."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

HELP = "tokenize JSON lines into .bin/.idx pairs"

_TERMINATED = 128 + signal.SIGTERM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.add_argument(
        "--input", nargs="+", required=True, type=Path, metavar="F", help="JSON-lines files, read in this order"
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="P", help="writes P_KEY_document.bin, .idx and .json per JSON key"
    )
    parser.add_argument(
        "--tokenizer", required=True, type=Path, metavar="T", help="tokenizer.model, tokenizer.json, or their folder"
    )
    parser.add_argument(
        "--workers", type=int, default=None, metavar="N", help="processes that encode (default: the usable CPUs)"
    )
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument(
        "--eod-token", metavar="X", help="the end-of-document token (default: the tokenizer's end of sentence)"
    )
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="K", help="keys to tokenize (default: text)"
    )
    parser.add_argument(
        "--extra-tokens",
        metavar="A,B|FILE",
        help="tokens to append to the vocabulary: a list, or a file with one a line",
    )


def run(arguments: argparse.Namespace) -> int:
    """Tokenize; the exit code."""
    from megatron.data.preprocess import PreprocessOptions, preprocess
    from megatron.tokenizer import read_extra_tokens

    options = PreprocessOptions(
        inputs=tuple(arguments.input),
        output_prefix=arguments.output_prefix,
        tokenizer=arguments.tokenizer,
        workers=len(os.sched_getaffinity(0)) if arguments.workers is None else arguments.workers,
        append_eod=arguments.append_eod,
        eod_token=arguments.eod_token,
        json_keys=tuple(arguments.json_keys),
        extra_tokens=tuple(read_extra_tokens(arguments.extra_tokens)) if arguments.extra_tokens else (),
    )
    before = signal.signal(signal.SIGTERM, _leave)  # ended from outside, clean up as after Ctrl-C
    try:
        preprocess(options)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(_TERMINATED)
