"""Megatron-LLM's `tools/preprocess_instruct_data.py`: its flags, carried out by `megatron preprocess --chat`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file it sees only its own folder

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
    parser = Parser("tokenize questions and answers into pairs of tokens and of roles")
    parser.add_argument("--input", nargs="+", required=True, help="JSON-lines files, packed or not")
    parser.add_argument("--question_key", default="input", help="JSON key of the question")
    parser.add_argument("--answer_key", default="output", help="JSON key of the answer")
    parser.add_argument("--system_key", help="JSON key of the system's text, if any")
    add_tokenizer_flags(parser)
    add_writing_flags(parser)
    arguments = parser.read(words)
    check_writing_flags(arguments)
    chosen = choose_tokenizer(arguments)
    return [
        "preprocess",
        "--chat",
        "--chat-template",
        "megatron-llm",
        "--input",
        *arguments.input,
        "--output-prefix",
        arguments.output_prefix,
        "--question-key",
        arguments.question_key,
        "--answer-key",
        arguments.answer_key,
        *(["--system-key", arguments.system_key] if arguments.system_key is not None else []),
        *chosen.words(end_of_document=False),
        *(["--workers", str(arguments.workers)] if arguments.workers is not None else []),
    ]


if __name__ == "__main__":
    sys.exit(run_tool(words_of_verb))
