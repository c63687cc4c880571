"""Megatron-LLM's `tools/merge_datasets.py`: its flags, carried out by `megatron merge`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file it sees only its own folder

from tools.megatron_llm_flags import Parser, run_tool


def words_of_verb(words: Sequence[str]) -> list[str]:
    """The words of `megatron merge` that mean the same."""
    parser = Parser("append the .bin/.idx pairs of a folder to each other, sorted by name")
    parser.add_argument("--input", required=True, help="folder of pairs")
    parser.add_argument("--output_prefix", required=True, help="prefix of the result")
    arguments = parser.read(words)
    return ["merge", "--input", arguments.input, "--output-prefix", arguments.output_prefix]


if __name__ == "__main__":
    sys.exit(run_tool(words_of_verb))
