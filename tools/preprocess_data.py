"""Megatron-LLM's `tools/preprocess_data.py`: its flags, carried out by `megatron preprocess`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file it sees only its own folder

from megatron.utils.errors import ConfigError
from tools.megatron_llm_flags import (
    Parser,
    add_tokenizer_flags,
    add_writing_flags,
    check_writing_flags,
    choose_tokenizer,
    run_tool,
)


def words_of_verb(words: Sequence[str]) -> list[str]:
    """The words of `megatron preprocess` that mean the same."""
    parser = Parser("tokenize JSON lines into .bin/.idx pairs")
    parser.add_argument("--input", nargs="+", required=True, help="JSON-lines files, packed or not")
    parser.add_argument("--json_keys", "--json_key", nargs="+", default=["text"], help="keys to tokenize")
    parser.add_argument("--append_eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--split_sentences", action="store_true", help="refused")
    parser.add_argument("--keep_newlines", action="store_true", help="refused")
    add_tokenizer_flags(parser)
    add_writing_flags(parser)
    arguments = parser.read(words)
    check_writing_flags(arguments)
    if arguments.split_sentences or arguments.keep_newlines:
        raise ConfigError("--split_sentences, --keep_newlines: a document is one sequence here; leave them out")
    chosen = choose_tokenizer(arguments)
    return [
        "preprocess",
        "--input",
        *arguments.input,
        "--output-prefix",
        arguments.output_prefix,
        "--json-keys",
        *arguments.json_keys,
        *chosen.words(end_of_document=arguments.append_eod),
        *(["--append-eod"] if arguments.append_eod else []),
        *(["--workers", str(arguments.workers)] if arguments.workers is not None else []),
    ]


if __name__ == "__main__":
    sys.exit(run_tool(words_of_verb))
