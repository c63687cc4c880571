"""Lines of JSON to the tokens of conversations and their roles. This module must not know in which process it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron.data.instruction.conversation import Keys, Message, read_conversation
from megatron.data.instruction.pair import Role
from megatron.data.instruction.template import Conversation, MegatronTemplate, Template
from megatron.data.jsonl import BadLine, Chunk, RefusedLine, bad_line, parse_chunk, parse_object, take_lines
from megatron.tokenizer import SpecialTokens, Tokenizer

MEGATRON_LLM = "megatron-llm"


@dataclass(frozen=True)
class ChatEncoding:
    """How lines become conversations: where their texts are; the template (`megatron-llm`, a file, or None: the one
    beside the tokenizer); and whether special tokens may be written out in a text, which then become ids."""

    keys: Keys
    template: str | None = None
    special_tokens: SpecialTokens = "text"


def open_template(tokenizer: Tokenizer, template: str | None) -> Template:
    """The template that is asked for. Raises ConfigError or DataError where there is none, or it does not fit."""
    if template == MEGATRON_LLM:
        return MegatronTemplate(tokenizer)
    # Jinja takes as long to import as everything else a worker needs, and text has no template.
    from megatron.data.instruction.chat_template import find_chat_template, read_chat_template

    if template is None:
        return find_chat_template(tokenizer.files[0])
    return read_chat_template(Path(template), tokenizer.files[0])


def encode_conversations(
    tokenizer: Tokenizer, chat: ChatEncoding, chunk: Chunk
) -> tuple[list[Conversation], list[int], int, list[BadLine]]:
    """The conversations of a chunk, each as its tokens and their roles; the places of their lines; the number of all
    lines; and the bad ones."""
    template = _opened(tokenizer, chat.template)
    if not chunk.columnar:
        return take_lines(chunk, lambda line: encode_conversation(tokenizer, template, chat, parse_object(line)))
    parsed = parse_chunk(chunk, chat.keys.read)
    conversations, places, bad = list[Conversation](), list[int](), parsed.bad
    for place, texts in zip(parsed.places, zip(*parsed.texts, strict=True), strict=True):
        line = dict(zip(chat.keys.read, texts, strict=True))
        try:
            conversations.append(encode_conversation(tokenizer, template, chat, line))
            places.append(place)
        except RefusedLine as error:
            bad.append(bad_line(place, error, "\n".join(texts).encode()))
    return conversations, places, parsed.num_lines, sorted(bad, key=lambda line: line.place)


@lru_cache(maxsize=1)
def _opened(tokenizer: Tokenizer, template: str | None) -> Template:
    return open_template(tokenizer, template)


def encode_conversation(
    tokenizer: Tokenizer, template: Template, chat: ChatEncoding, line: Mapping[str, Any]
) -> Conversation:
    """The tokens of the conversation in a line and the role of each. Raises RefusedLine."""
    messages = read_conversation(line, chat.keys)
    if chat.special_tokens == "text":
        _check_no_special_tokens(tokenizer, messages)
    tokens, roles = template.encode(tokenizer, messages)
    if Role.ASSISTANT not in roles[1:]:
        raise RefusedLine("the template leaves nothing of its answers")
    return tokens, roles


def _check_no_special_tokens(tokenizer: Tokenizer, messages: list[Message]) -> None:
    for number, message in enumerate(messages, start=1):
        if found := tokenizer.special_tokens_in(message["content"]):
            raise RefusedLine(
                f"the content of message {number} has the special token {found[0]} written out, which would end or "
                "begin something there; take it out, or let it be a token with --special-tokens ids"
            )
