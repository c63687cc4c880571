"""What a line of JSON says: a conversation, or what is wrong with it.

Either under `messages` (each with `role` and `content`), or as a question and its answer under keys of their own,
perhaps with a system's text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.data.instruction.pair import Role
from megatron.data.jsonl import RefusedLine, kind_of, text_under

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {
    SYSTEM: Role.SYSTEM,
    "developer": Role.SYSTEM,
    USER: Role.PROMPTER,
    "tool": Role.PROMPTER,
    ASSISTANT: Role.ASSISTANT,
}

Message = Mapping[str, Any]  # `role`, `content`, and what else a chat template may read


@dataclass(frozen=True)
class Keys:
    """Where a line has its conversation: `messages`, or else a `question`, its `answer`, and a `system` text if any."""

    messages: str | None = "messages"
    question: str = "input"
    answer: str = "output"
    system: str | None = None

    @property
    def read(self) -> tuple[str, ...]:
        """The keys that are read."""
        if self.messages is not None:
            return (self.messages,)
        return (self.question, self.answer) + ((self.system,) if self.system else ())

    @property
    def rule(self) -> str:
        """What every line must be, in words."""
        if self.messages is not None:
            return f"every line must be a JSON object with a list of messages (role, content) under {self.messages!r}"
        return f"every line must be a JSON object with a text under {', '.join(map(repr, self.read))}"


def read_conversation(line: Mapping[str, Any], keys: Keys) -> list[Message]:
    """The messages of a line, checked: known roles, texts, at least one answer and none empty.

    Raises RefusedLine.
    """
    messages = _question_and_answer(line, keys) if keys.messages is None else _messages(line, keys.messages)
    answers = [message["content"] for message in messages if message["role"] == ASSISTANT]
    if not answers:
        raise RefusedLine("it has no message of the role 'assistant', so there is nothing to learn")
    if not all(answer.strip() for answer in answers):
        raise RefusedLine("an answer is empty: the model would learn to say nothing")
    return messages


def _question_and_answer(line: Mapping[str, Any], keys: Keys) -> list[Message]:
    messages: list[Message] = []
    named = [(SYSTEM, keys.system), (USER, keys.question), (ASSISTANT, keys.answer)]
    for role, key in named:
        if key is None or (role == SYSTEM and key in line and line[key] is None):
            continue
        messages.append({"role": role, "content": text_under(line, key)})
    return messages


def _messages(line: Mapping[str, Any], key: str) -> list[Message]:
    if key not in line:
        raise RefusedLine(f"no key {key!r} (it has {', '.join(map(repr, list(line)[:8])) or 'none'})")
    messages = line[key]
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else kind_of(messages)
        raise RefusedLine(f"the value of {key!r} is not a list of messages but {what}")
    return [_message(message, number) for number, message in enumerate(messages, start=1)]


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise RefusedLine(f"message {number} is not an object but {kind_of(message)}")
    try:
        role, _ = text_under(message, "role"), text_under(message, "content")
    except RefusedLine as error:
        raise RefusedLine(f"message {number}: {error}") from error
    if role not in ROLES:
        raise RefusedLine(f"message {number} has the unknown role {role!r}; roles are {', '.join(ROLES)}")
    return message
