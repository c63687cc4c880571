"""`megatron diff`: what differs between two models, whatever their formats and however they are cut."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.checkpoint.compare import Comparison

HELP = "compare two models of any formats tensor by tensor"

_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("first", metavar="A", type=Path, help="folder or hf:// address of a model, or save folder")
    parser.add_argument("second", metavar="B", type=Path, help="the one to compare it with")
    parser.add_argument(
        "--tolerance", type=float, metavar="X", help="let differences up to X, and other dtypes, count as equal"
    )
    parser.add_argument(
        "--logits",
        metavar="DATA",
        help="compare A's logits with what transformers computes of B, on a .bin/.idx pair or a text file",
    )
    parser.add_argument("--layers", action="store_true", help="with --logits: what is behind each layer as well")
    parser.add_argument("--sequence-length", type=int, default=256, metavar="N", help="with --logits: tokens in a row")
    parser.add_argument("--micro-batch", type=int, default=1, metavar="N", help="with --logits: rows at a time")
    parser.add_argument("--batches", type=int, default=10, metavar="N", help="with --logits: how many times")
    parser.add_argument("--device", default="cpu", help="with --logits: where transformers computes")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every tensor that differs")


def run(arguments: argparse.Namespace) -> int:
    """Print what differs; 0 where nothing does, 1 where something does. Raises MegatronError."""
    from megatron.checkpoint.compare import compare
    from megatron.checkpoint.source import open_source
    from megatron.utils.progress import ProgressLine

    if arguments.logits is not None:
        return _compare_logits(arguments)
    line = ProgressLine()
    try:
        with open_source(arguments.first) as first, open_source(arguments.second) as second:
            found = compare(first, second, line.show)
    finally:
        line.clear()
    different = found.is_different(arguments.tolerance)
    if arguments.json:
        print(json.dumps({"different": different, **_as_json(found)}))
    else:
        _print_table(found, different)
    return int(different)


def _compare_logits(arguments: argparse.Namespace) -> int:
    from megatron.verify.logits import Wish, agreement_line, agreements, verdict

    wish = Wish(
        arguments.logits,
        arguments.sequence_length,
        arguments.micro_batch,
        arguments.batches,
        arguments.device,
        arguments.layers,
    )
    found = []
    for number, agreement in enumerate(agreements(arguments.first, arguments.second, wish)):
        found.append(agreement)
        print(agreement_line(number, agreement))
    print(verdict(found))
    return 0 if all(agreement.holds for agreement in found) else 1


def _as_json(found: Comparison) -> dict[str, Any]:
    from dataclasses import asdict

    content = asdict(found)
    content["missing"] = {"first": found.missing[0], "second": found.missing[1]}
    for tensor in content["values"]:  # JSON has no infinity
        tensor.update({key: str(tensor[key]) for key in ("largest", "relative") if tensor[key] == float("inf")})
    return content


def _print_table(found: Comparison, different: bool) -> None:
    for name, (first, second) in found.config.items():
        print(f"config   {name}: {first} and {second}")
    for side, names in zip(("first", "second"), found.missing, strict=True):
        _print_some(f"missing in the {side}", names)
    _print_some("shape", found.shapes)
    _print_some("dtype", found.dtypes)
    _print_some(
        "values",
        [
            f"{'' if one.kind == 'weights' else one.kind + ' of '}{one.name}: largest difference {one.largest:.3g} "
            f"(relative {one.relative:.3g}), {one.differing:,} of {one.numel:,} elements"
            for one in found.values
        ],
    )
    _print_some("note", found.notes)
    print(f"{'different' if different else 'equal'}: {found.compared} tensors compared")


def _print_some(label: str, lines: list[str]) -> None:
    for line in lines[:_SHOWN]:
        print(f"{label:<8} {line}")
    if len(lines) > _SHOWN:
        print(f"{label:<8} … and {len(lines) - _SHOWN} more (--json lists all)")
