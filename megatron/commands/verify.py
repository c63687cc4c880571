"""`megatron verify`: prove on this machine that a configuration computes on a grid what it computes on one rank."""

from __future__ import annotations

import argparse
import json
import shlex
import sys

HELP = "prove that a grid of ranks computes what one rank does, in float64 on this machine"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("--config", metavar="FILE", help="configuration file, or the name of a preset (see docs)")
    parser.add_argument(
        "--grid", default="", metavar="AXES", help="sizes of the axes, as tp=2,pp=2,cp=2,dp=2 (default: as configured)"
    )
    parser.add_argument("--mutate", action="store_true", help="also leave out each kind of message, and see it noticed")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print the certificate; 0 where it holds, else 1. Raises ConfigError for what cannot be run."""
    from megatron.config.load import load_config
    from megatron.train.origin import shrunk_model
    from megatron.verify.certificate import certify, parse_grid
    from megatron.verify.report import to_json, to_text

    unrecognized = " ".join(arguments.unrecognized)
    problems = [f"unrecognized arguments: {unrecognized}; see megatron verify --help"] if unrecognized else []
    config = load_config(arguments.config, ["--data.train=synthetic", *arguments.overrides], problems=problems)
    config, world_size = parse_grid(arguments.grid, config)
    model = shrunk_model(config)

    def say(text: str) -> None:
        sys.stderr.write(f"megatron verify: {text}\n")

    certificate = certify(config, model, world_size, mutate=arguments.mutate, say=say)
    command = shlex.join(["megatron", *sys.argv[1:]])
    print(json.dumps(to_json(certificate)) if arguments.json else to_text(certificate, command), end="")
    return 0 if certificate.holds else 1
