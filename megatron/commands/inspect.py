"""`megatron inspect`: what a checkpoint, a Hugging Face folder or a pair of token files holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.utils.errors import ConfigError
from megatron.utils.hub import parse_address, spelling_hint

if TYPE_CHECKING:
    from megatron.checkpoint.source import Source

HELP = "show what a checkpoint, a Hugging Face folder or a .bin/.idx pair holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument(
        "path", metavar="X", help="folder or hf:// address of a model, save folder, or prefix of a .bin/.idx pair"
    )
    parser.add_argument("--verify", action="store_true", help="read all of it and compare the checksums")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print the description on standard output. Raises MegatronError for what is not there or damaged."""
    prefix = _token_prefix(arguments.path)
    if prefix is not None:
        _inspect_tokens(prefix, arguments)
        return 0
    if not Path(arguments.path).exists() and parse_address(arguments.path) is None:
        raise ConfigError(
            f"{arguments.path} does not exist: give a folder, or the prefix of a .bin/.idx pair."
            f"{spelling_hint(arguments.path)}"
        )
    from megatron.checkpoint.hub import local_folder
    from megatron.checkpoint.source import open_stored

    folder = local_folder(arguments.path)
    with open_stored(folder) as source:
        _inspect_model(source, folder, arguments)
    return 0


def _token_prefix(path: str) -> str | None:
    """The prefix of a .bin/.idx pair, where the path names one (or one of its two files)."""
    prefix = path.removesuffix(".bin").removesuffix(".idx")
    if Path(path).is_dir() or parse_address(path) is not None:
        return None
    there = Path(prefix + ".bin").is_file() or Path(prefix + ".idx").is_file()
    return prefix if there or prefix != path else None


def _inspect_tokens(prefix: str, arguments: argparse.Namespace) -> None:
    from megatron.data.describe import describe_indexed, table_of_pair, verify_pair

    if arguments.tensors:
        raise ConfigError("--tensors is for models; token files have no tensors.")
    verified = verify_pair(prefix) if arguments.verify else None
    description = describe_indexed(prefix)
    if arguments.json:
        _print_json({**description, "verified": verified} if verified else description)
    else:
        _print_table(table_of_pair(description) + ([("verified", verified)] if verified else []))


def _inspect_model(source: Source, folder: Path, arguments: argparse.Namespace) -> None:
    from megatron.checkpoint.describe import describe, list_tensors, table, verify

    verified = verify(source) if arguments.verify else None
    description = describe(source, folder)
    tensors = list_tensors(source) if arguments.tensors else []
    if arguments.json:
        extra = {"verified": verified} if verified else {}
        _print_json({**description, **extra, **({"tensor_list": tensors} if arguments.tensors else {})})
        return
    _print_table(table(description) + ([("verified", verified)] if verified else []))
    for tensor in tensors:
        shape = " x ".join(map(str, tensor["shape"]))
        pieces = "" if tensor["pieces"] == 1 else f"  {tensor['pieces']} pieces in {len(tensor['files'])} file(s)"
        print(f"{tensor['kind']:<10}  {tensor['name']:<48}  {tensor['dtype']:<4}  {shape}{pieces}")


def _print_table(rows: list[tuple[str, str]]) -> None:
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        print(f"{label:<{width}}  {text}")


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content))
