"""Chat templates in Jinja, those of Hugging Face's `tokenizer_config.json`, and which part of their text is an answer.

They run in Jinja's sandbox, with the extensions that they are written for. The time of day is kept from them: it would
make other data from the same text each day.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from megatron.data.instruction.conversation import ROLES, Message
from megatron.data.instruction.pair import Role
from megatron.data.instruction.template import Conversation
from megatron.data.jsonl import RefusedLine
from megatron.tokenizer import Tokenizer
from megatron.tokenizer.load import read_json
from megatron.utils.errors import ConfigError, DataError

_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BEGIN, _END = "\ufdd0", "\ufdd1"  # around answers while a template runs; Unicode keeps them out of all text

Part = tuple[int, Role]  # a character from which on, to the next part, the text is of a role


class _Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`, around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


class ChatTemplate:
    """A chat template. The text that it makes of a conversation is tokenized as a whole, its special tokens as such.

    Where it marks answers by `{% generation %}`, these are the assistant's. Otherwise an answer goes from the end of
    the text of the messages before it, with the prompt for an answer that the template puts behind them, to the end of
    the text of the messages up to it: so these texts must begin the whole. Then the assistant's tokens are those that a
    model has to say when it is given the tokens before them. Raises ConfigError for what is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        self._special_tokens, self._origin = dict(special_tokens), origin
        self._marks_answers = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template of {origin} cannot be read: {error} (line {error.lineno})") from error

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Conversation:
        """The tokens of a conversation and the role of each. Raises RefusedLine for one that cannot be divided."""
        text, parts = self.parts(messages)
        tokens, *alone = tokenizer.encode_markup([text, *(text[:begin] for begin, _ in parts[1:])])
        firsts = np.array([0, *(_alike(one, tokens) for one in alone)])
        owners = np.searchsorted(firsts, np.arange(len(tokens)), side="right") - 1
        return tokens, np.array([int(role) for _, role in parts])[owners]

    def parts(self, messages: Sequence[Message]) -> tuple[str, list[Part]]:
        """The text of a conversation, and the parts that it consists of, the first from its first character on.

        Of parts that begin at the same character, all but the last are empty.
        """
        _check_noncharacters(messages)
        marked = self._render(messages)
        text = marked.replace(_BEGIN, "").replace(_END, "")
        if self._marks_answers:
            return text, _marked_parts(marked)
        parts: list[Part] = []
        begin = 0  # of the message
        for number, message in enumerate(messages):
            role = ROLES[message["role"]]
            if role is Role.ASSISTANT:
                answer = self._answer_begin(messages[:number], text, begin)
                parts += [(begin, Role.PROMPTER), (answer, role)]
                begin = self._end(messages[: number + 1], text, answer)
            else:
                parts.append((begin, role))
                begin = self._end_if_any(messages[: number + 1], text, begin)
        return text, parts

    def _answer_begin(self, before: Sequence[Message], text: str, begin: int) -> int:
        """Where an answer to these messages begins: behind the prompt for it, or without one where its message does."""
        prompt = self._try(before, add_generation_prompt=True)
        return len(prompt) if prompt is not None and text.startswith(prompt) and len(prompt) >= begin else begin

    def _end(self, messages: Sequence[Message], text: str, begin: int) -> int:
        """Where an answer that begins at `begin`, the last of these messages, ends."""
        rendered = self._render(messages)
        if not text.startswith(rendered) or len(rendered) < begin:
            raise RefusedLine(
                f"the chat template of {self._origin} writes the first {len(messages)} messages otherwise when more "
                "follow, so the answer's part of the whole is not known; mark answers in the template by "
                "{% generation %} ... {% endgeneration %}, or use conversations of one answer"
            )
        return len(rendered)

    def _end_if_any(self, messages: Sequence[Message], text: str, begin: int) -> int:
        """Where a prompt ends; where it began, if the template only writes it with what follows."""
        rendered = self._try(messages)
        return max(begin, len(rendered)) if rendered is not None and text.startswith(rendered) else begin

    def _try(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str | None:
        """The text of some first messages; None where the template refuses them."""
        try:
            return self._render(messages, add_generation_prompt)
        except RefusedLine:
            return None

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise RefusedLine(f"the chat template of {self._origin} refuses it: {error}") from error


def find_chat_template(tokenizer: Path) -> ChatTemplate:
    """The chat template that lies beside a tokenizer: `chat_template.jinja`, or in `tokenizer_config.json`.

    Raises ConfigError where there is none, DataError for files that are damaged.
    """
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    file, config = folder / _TEMPLATE, read_json(folder / _CONFIG)
    if file.is_file():
        return read_chat_template(file, tokenizer)
    source = config.get("chat_template")
    if isinstance(source, list):  # several, each with a name
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if not isinstance(source, str):
        raise ConfigError(
            f"{folder} has no chat template (neither {_TEMPLATE} nor `chat_template` in {_CONFIG}); name one with "
            "--chat-template: a file, or megatron-llm for Megatron-LLM's"
        )
    return ChatTemplate(source, _special_tokens(config), str(folder / _CONFIG))


def read_chat_template(file: Path, tokenizer: Path) -> ChatTemplate:
    """The chat template in a file, with the special tokens of a tokenizer. Raises DataError if it cannot be read."""
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a chat template: {error}") from error
    return ChatTemplate(source, _special_tokens(read_json(folder / _CONFIG)), str(file))


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that templates know by name, as the files write them: a text, or an object with its content."""
    named = {name: config.get(name) for name in _TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    return {name: token for name, token in texts.items() if isinstance(token, str)}


def _marked_parts(marked: str) -> list[Part]:
    """The parts of a text in which answers are marked; what is outside of them counts as the prompter's."""
    parts: list[Part] = [(0, Role.PROMPTER)]
    place = 0
    for piece in re.split(f"([{_BEGIN}{_END}])", marked):
        if piece == _BEGIN:
            parts.append((place, Role.ASSISTANT))
        elif piece == _END:
            parts.append((place, Role.PROMPTER))
        else:
            place += len(piece)
    if not any(role is Role.ASSISTANT for _, role in parts):
        raise RefusedLine("the chat template marks no answer in it by {% generation %}")
    return parts


def _alike(beginning: NDArray[np.integer], tokens: NDArray[np.integer]) -> int:
    """How many of a text's tokens are those of its beginning alone: a token across the seam belongs to what follows."""
    common = min(len(beginning), len(tokens))
    different = np.flatnonzero(beginning[:common] != tokens[:common])
    return int(different[0]) if len(different) else common


def _check_noncharacters(messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages, start=1):
        if _BEGIN in message["content"] or _END in message["content"]:
            raise RefusedLine(f"the content of message {number} holds U+FDD0 or U+FDD1, which are no characters")


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
