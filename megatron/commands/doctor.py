"""`megatron doctor`: what this machine has for training, what is in use, and how to mend the rest."""

from __future__ import annotations

import argparse

HELP = "show what is active on this machine (torch, GPUs, compilers, kernels, libraries), and why not the rest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings on standard output. What is missing is a finding, not an error."""
    import dataclasses
    import json

    from megatron.data import native
    from megatron.kernels.diagnosis import Fact, diagnose

    compiled = native.load() is not None
    facts = [
        *diagnose(),
        Fact(
            "data helpers",
            compiled,
            "compiled" if compiled else "not built: samples are found and copied in numpy, slower",
            None if compiled else "install a C++ compiler and install this package again",
        ),
    ]
    if arguments.json:
        print(json.dumps({"facts": [dataclasses.asdict(fact) for fact in facts]}))
        return 0
    width = max(len(fact.name) for fact in facts)
    for fact in facts:
        mark = {True: "yes", False: "no", None: "-"}[fact.good]
        print(f"{fact.name:<{width}}  {mark:<3}  {fact.text}")
        if fact.cure is not None:
            print(f"{'':<{width}}       -> {fact.cure}")
    return 0
