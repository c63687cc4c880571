"""From the messages of a conversation to tokens and the role of each; Megatron-LLM's template.

The other kind of template is in chat_template.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.data.instruction.conversation import ASSISTANT, ROLES, SYSTEM, USER, Message
from megatron.data.jsonl import RefusedLine
from megatron.tokenizer import Tokenizer
from megatron.utils.errors import ConfigError

START, END = "<|im_start|>", "<|im_end|>"
_WORDS = {SYSTEM: "system", USER: "question", ASSISTANT: "answer"}


Conversation = tuple[NDArray[np.integer], NDArray[np.integer]]  # tokens and the role of each


class Template(Protocol):
    """How conversations are written in tokens."""

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Conversation:
        """The tokens of a conversation and the role of each. Raises RefusedLine for one that does not fit."""
        ...


class MegatronTemplate:
    """Megatron-LLM's: `<|im_start|>WORD`, newline, the message, `<|im_end|>`, newline, where WORD is `system`,
    `question` or `answer`.

    Each message is tokenized on its own, and all its tokens, tags and the last newline included, have its role. There
    is neither a beginning nor an end of sentence. Raises ConfigError where the tags are no tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        missing = [tag for tag in (START, END) if tokenizer.token_id(tag) is None]
        if missing:
            raise ConfigError(
                f"{' and '.join(missing)} is no token of {tokenizer.files[0]}: Megatron-LLM's template writes messages "
                f"between {START} and {END}; add them with --extra-tokens '{START},{END}'"
            )

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> Conversation:
        """The tokens of a conversation and the role of each."""
        for message in messages:
            if message["role"] not in _WORDS:
                raise RefusedLine(
                    f"the role {message['role']!r} is none of Megatron-LLM's template, which has {', '.join(_WORDS)}"
                )
        texts = [f"{START}{_WORDS[message['role']]}\n{message['content']}{END}\n" for message in messages]
        # Control tokens that are written out become ids, as they do there.
        tokens, sizes = tokenizer.encode_batch(texts, special_tokens="ids")
        return tokens, np.repeat([int(ROLES[message["role"]]) for message in messages], sizes)
