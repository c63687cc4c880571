"""`megatron preprocess`: tokenize JSON lines or parquet into Megatron's `.bin/.idx` pairs."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from megatron.data.instruction.encode import ChatEncoding

HELP = "tokenize JSON lines or parquet into .bin/.idx pairs"

_TERMINATED = 128 + signal.SIGTERM
_MESSAGES_KEY = "messages"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this verb."""
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="F",
        help="files of JSON lines (plain, .gz, .zst, .bz2, .xz) or parquet, folders or patterns of them, read in this "
        "order; - is standard input",
    )  # fmt: skip
    parser.add_argument(
        "--output-prefix", required=True, metavar="P",
        help="writes P_KEY_document.bin, .idx and .json per JSON key; with --chat P-text and P-role",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=Path,
        metavar="T",
        help="tokenizer.model, tokenizer.json, or their folder or hf:// address",
    )
    parser.add_argument(
        "--workers", type=int, default=None, metavar="N", help="processes that encode (default: the usable CPUs)"
    )
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument(
        "--eod-token",
        metavar="X",
        help="the token that --append-eod appends (default: the tokenizer's end of sentence)",
    )
    parser.add_argument("--prepend-bos", action="store_true", help="begin each document with the beginning of sentence")
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="K", help="keys (columns) to tokenize (default: text)"
    )
    parser.add_argument(
        "--extra-tokens",
        metavar="A,B|FILE",
        help="tokens to append to the vocabulary: a list, or a file with one a line",
    )
    parser.add_argument(
        "--special-tokens", choices=["text", "ids"], default="text",
        help="what a control token such as </s> that is written out in a text becomes: text (default; with --chat the "
        "line is bad), or its id",
    )  # fmt: skip
    parser.add_argument(
        "--max-bad-lines", default=None, metavar="N|P%",
        help="stop if more lines than this give no text (default: 0.1%%); they go to P.quarantine.jsonl",
    )  # fmt: skip
    _add_chat_arguments(parser)
    parser.add_argument(
        "--shard", metavar="I/N", help="do only part I (from 0) of N, for `megatron merge` to put together"
    )
    parser.add_argument(
        "--restart", action="store_true", help="begin again, where an interrupted run would be continued"
    )


def _add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chat", action="store_true",
        help="lines are conversations: lists of messages (role, content), for training on their answers",
    )  # fmt: skip
    parser.add_argument(
        "--chat-template", metavar="FILE|megatron-llm",
        help="a Jinja template, or Megatron-LLM's (default: the one beside the tokenizer)",
    )  # fmt: skip
    parser.add_argument("--messages-key", metavar="K", help=f"the key of the messages (default: {_MESSAGES_KEY})")
    parser.add_argument("--question-key", metavar="K", help="instead of messages, the key of a question")
    parser.add_argument("--answer-key", metavar="K", help="the key of its answer")
    parser.add_argument("--system-key", metavar="K", help="the key of a text of the system's, if any")


def _chat(arguments: argparse.Namespace) -> ChatEncoding | None:
    """What `--chat` and its options mean. Raises ConfigError for options that do not go together."""
    from megatron.data.instruction.conversation import Keys
    from megatron.data.instruction.encode import ChatEncoding
    from megatron.utils.errors import ConfigError

    messages, question, answer, system = (
        arguments.messages_key, arguments.question_key, arguments.answer_key, arguments.system_key
    )  # fmt: skip
    if not arguments.chat:
        given = {"chat-template": arguments.chat_template, "messages-key": messages, "question-key": question,
                 "answer-key": answer, "system-key": system}  # fmt: skip
        if any(given.values()):
            raise ConfigError(f"--{next(name for name in given if given[name])} is for conversations: add --chat")
        return None
    if arguments.json_keys != ["text"]:
        raise ConfigError("--json-keys with --chat: use --messages-key, or --question-key and --answer-key")
    if (question is None) != (answer is None) or (system is not None and question is None):
        raise ConfigError("--question-key and --answer-key go together (and --system-key with them): give both")
    if messages is not None and question is not None:
        raise ConfigError("--messages-key and --question-key: a line holds either messages or a question; give one")
    keys = Keys(messages or _MESSAGES_KEY) if question is None else Keys(None, question, answer, system)
    return ChatEncoding(keys, arguments.chat_template, arguments.special_tokens)


def run(arguments: argparse.Namespace) -> int:
    """Tokenize; the exit code."""
    from megatron.data.preprocess import PreprocessOptions, preprocess
    from megatron.data.preprocess.inputs import parse_shard
    from megatron.data.preprocess.quarantine import DEFAULT_BUDGET, parse_budget
    from megatron.tokenizer import local_tokenizer, read_extra_tokens

    options = PreprocessOptions(
        inputs=tuple(arguments.input),
        output_prefix=arguments.output_prefix,
        tokenizer=local_tokenizer(arguments.tokenizer),
        workers=usable_cpus() if arguments.workers is None else arguments.workers,
        append_eod=arguments.append_eod,
        eod_token=arguments.eod_token,
        json_keys=tuple(arguments.json_keys),
        extra_tokens=tuple(read_extra_tokens(arguments.extra_tokens)) if arguments.extra_tokens else (),
        prepend_bos=arguments.prepend_bos,
        special_tokens=arguments.special_tokens,
        chat=_chat(arguments),
        max_bad_lines=DEFAULT_BUDGET if arguments.max_bad_lines is None else parse_budget(arguments.max_bad_lines),
        shard=None if arguments.shard is None else parse_shard(arguments.shard),
        restart=arguments.restart,
    )
    with orderly_termination():
        preprocess(options)
    return 0


def usable_cpus() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def orderly_termination() -> Iterator[None]:
    """Ended from outside meanwhile, end as after Ctrl-C."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(_TERMINATED)
