"""`megatron merge`: several `.bin/.idx` pairs as one."""

from __future__ import annotations

import argparse

from megatron.commands.preprocess import orderly_termination

HELP = "append .bin/.idx pairs to each other"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="P",
        help="prefixes of pairs, a folder of pairs, or a pattern of .idx files (both sorted by name), in this order",
    )  # fmt: skip
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.json")


def run(arguments: argparse.Namespace) -> int:
    """Merge; the exit code."""
    from megatron.data.merge import merge

    with orderly_termination():
        merge(arguments.input, arguments.output_prefix)
    return 0
