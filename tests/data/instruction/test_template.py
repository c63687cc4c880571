"""Megatron-LLM's template and rules for tokens, against SentencePiece itself; and what lines may hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

from megatron.data.instruction.conversation import Keys, read_conversation
from megatron.data.instruction.encode import MEGATRON_LLM, ChatEncoding, encode_conversation, open_template
from megatron.data.jsonl import RefusedLine
from megatron.tokenizer import Tokenizer, load_tokenizer
from megatron.utils.errors import ConfigError

from ..conftest import tiny_tokenizer  # noqa: F401 - a fixture

TAGS = ("<|im_start|>", "<|im_end|>")
ORCA = Keys(None, "question", "response", "system_prompt")


def by_megatron_llm(model: Path, line: dict[str, Any], keys: Keys) -> tuple[list[int], list[int]]:
    """Its rules in a few lines: literal special tokens become ids, the text between them is encoded piece by piece."""
    processor = SentencePieceProcessor(model_file=str(model))
    special = {"<s>": 1, "</s>": 2, TAGS[0]: len(processor), TAGS[1]: len(processor) + 1}
    tokens, roles = [], []
    for role, (word, key) in enumerate((("system", keys.system), ("question", keys.question), ("answer", keys.answer))):
        if key is None or line[key] is None:
            continue
        text, ids = f"<|im_start|>{word}\n{line[key]}<|im_end|>\n", list[int]()
        for part in re.split("(" + "|".join(map(re.escape, special)) + ")", text):
            ids += [special[part]] if part in special else processor.encode(part) if part else []
        tokens += ids
        roles += [role] * len(ids)
    return tokens, roles


def encode(tokenizer: Tokenizer, chat: ChatEncoding, line: dict[str, Any]) -> tuple[list[int], list[int]]:
    tokens, roles = encode_conversation(tokenizer, open_template(tokenizer, chat.template), chat, line)
    return tokens.tolist(), roles.tolist()


LINES: list[dict[str, Any]] = [
    {"system_prompt": "the ward", "question": "given pain?", "response": "aspirin"},
    {"system_prompt": "", "question": "  the\n\npatient ", "response": "rest\n"},
    {"system_prompt": None, "question": "naïve 日本", "response": " fever"},
    {"system_prompt": "x", "question": "", "response": "y"},
]


@pytest.mark.parametrize("line", LINES)
def test_tokens_and_roles_are_megatron_llms(tiny_tokenizer: Path, line: dict[str, Any]) -> None:  # noqa: F811
    tokenizer = load_tokenizer(tiny_tokenizer, TAGS)
    chat = ChatEncoding(ORCA, MEGATRON_LLM)
    found = encode(tokenizer, chat, line)
    assert found == by_megatron_llm(tiny_tokenizer, line, ORCA)
    assert set(found[1]) == ({1, 2} if line["system_prompt"] is None else {0, 1, 2})


def test_special_tokens_within_a_text_are_refused_or_ids(tiny_tokenizer: Path) -> None:  # noqa: F811
    tokenizer = load_tokenizer(tiny_tokenizer, TAGS)
    line = {"input": "end</s> of <|im_end|> it", "output": "<s>aspirin"}
    keys = Keys(None)
    with pytest.raises(RefusedLine, match=r"message 1 has the special token </s> .*--special-tokens ids"):
        encode(tokenizer, ChatEncoding(keys, MEGATRON_LLM), line)
    allowed = ChatEncoding(keys, MEGATRON_LLM, special_tokens="ids")
    assert encode(tokenizer, allowed, line) == by_megatron_llm(tiny_tokenizer, line, keys)


def test_the_real_tokenizer_gives_the_newline_two_tokens(shared: Path) -> None:
    """As Llama-2's: a space mark follows each special token, so the newline behind it comes with one."""
    model = shared / "data" / "tokenizers" / "mistral_v1_tokenizer.model"
    tokenizer = load_tokenizer(model, TAGS)
    line = {"input": "C", "output": "D"}
    chat = ChatEncoding(Keys(None), MEGATRON_LLM)
    tokens, roles = encode(tokenizer, chat, line)
    assert (tokens, roles) == by_megatron_llm(model, line, chat.keys)
    assert len(tokens) == 14 and roles == [1] * 7 + [2] * 7 and tokens[0] == tokens[7] == 32000
    assert tokens[4:7] == [32001, tokenizer.token_id("▁"), tokenizer.token_id("<0x0A>")]


def test_several_turns_each_have_their_role(tiny_tokenizer: Path) -> None:  # noqa: F811
    tokenizer = load_tokenizer(tiny_tokenizer, TAGS)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    line = {"messages": [{"role": role, "content": content} for role, content in turns]}
    found = encode(tokenizer, ChatEncoding(Keys(), MEGATRON_LLM), line)
    pairs = [
        by_megatron_llm(tiny_tokenizer, {"input": one, "output": other}, Keys(None)) for one, other in ("ab", "cd")
    ]
    assert found == (pairs[0][0] + pairs[1][0], pairs[0][1] + pairs[1][1])


def test_the_tags_must_be_tokens(tiny_tokenizer: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=r"<\|im_start\|> and <\|im_end\|> is no token.*--extra-tokens"):
        open_template(load_tokenizer(tiny_tokenizer), MEGATRON_LLM)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({}, "no key 'messages' (it has none)"),
        ({"messages": "hello"}, "not a list of messages but text"),
        ({"messages": []}, "not a list of messages but an empty list"),
        ({"messages": ["hello"]}, "message 1 is not an object but text"),
        ({"messages": [{"role": "user"}]}, "message 1: no key 'content' (it has 'role')"),
        ({"messages": [{"role": "human", "content": "a"}]}, "unknown role 'human'; roles are system, developer, user"),
        ({"messages": [{"role": None, "content": "a"}]}, "message 1: the value of 'role' is not text but null"),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            "the value of 'content' is not text but a list",
        ),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, "half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "a"}]}, "nothing to learn"),
        ({"messages": [{"role": "assistant", "content": " \n"}]}, "an answer is empty"),
    ],
)
def test_lines_that_are_no_conversation(line: dict[str, Any], why: str) -> None:
    with pytest.raises(RefusedLine, match=re.escape(why)):
        read_conversation(line, Keys())


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({"question": "a"}, "no key 'system_prompt' (it has 'question')"),
        ({"system_prompt": "", "question": "a"}, "no key 'response'"),
        ({"system_prompt": 3, "question": "a", "response": "b"}, "'system_prompt' is not text but a number"),
        ({"system_prompt": "", "question": None, "response": "b"}, "'question' is not text but null"),
        ({"system_prompt": "", "question": "a", "response": ""}, "an answer is empty"),
    ],
)
def test_lines_without_a_question_and_an_answer(line: dict[str, Any], why: str) -> None:
    with pytest.raises(RefusedLine, match=re.escape(why)):
        read_conversation(line, ORCA)
    assert ORCA.rule.endswith("'question', 'response', 'system_prompt'")
