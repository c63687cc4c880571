"""Chat templates: tokens and masks as transformers has them, roles by text, and what cannot be divided."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron.data.instruction.chat_template import ChatTemplate, find_chat_template, read_chat_template
from megatron.data.instruction.pair import Role
from megatron.data.jsonl import RefusedLine
from megatron.tokenizer import load_tokenizer
from megatron.utils.errors import ConfigError, DataError

from .templates import FOLDED, FORGETFUL, HEADERS, MARKED, make_folder, make_marking_folder

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


def talk(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


SHORT = talk((USER, "what helps?"), (ASSISTANT, "aspirin."))
LONG = talk(
    (SYSTEM, "You know pain."),
    (USER, " what helps against pain? "),
    (ASSISTANT, "aspirin helps,\n\nrest as well."),
    (USER, "日本語 and \u00e9\n"),
    (ASSISTANT, "\n\nrest."),
)


def roles_by_text(template: ChatTemplate, messages: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The text of each part that is not empty, with its role."""
    text, parts = template.parts(messages)
    assert [begin for begin, _ in parts] == sorted(begin for begin, _ in parts) and parts[0][0] == 0
    ends = [begin for begin, _ in parts[1:]] + [len(text)]
    return [(text[begin:end], role.name) for (begin, role), end in zip(parts, ends, strict=True) if end > begin]


@pytest.mark.parametrize("source", [HEADERS, FOLDED, MARKED, FORGETFUL], ids=["headers", "folded", "marked", "forgets"])
@pytest.mark.parametrize("messages", [SHORT, LONG[:3], LONG], ids=["short", "system", "long"])
def test_tokens_are_those_of_transformers(tmp_path: Path, source: str, messages: list[dict[str, Any]]) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make_folder(tmp_path / "folder", source)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    template, tokenizer = find_chat_template(folder), load_tokenizer(folder)
    text = theirs.apply_chat_template(messages, tokenize=False)
    if source == FORGETFUL and messages is LONG:
        with pytest.raises(RefusedLine, match=r"first 3 messages otherwise when more follow.*generation"):
            template.encode(tokenizer, messages)
        return
    tokens, roles = (part.tolist() for part in template.encode(tokenizer, messages))
    assert template.parts(messages)[0] == text and tokens == expected["input_ids"] and len(roles) == len(tokens)
    assert Role.ASSISTANT in roles
    if source == MARKED:
        assert [int(role == Role.ASSISTANT) for role in roles] == expected["assistant_masks"]


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("strips", [False, True])
def test_spaces_beside_special_tokens_are_as_transformers_has_them(tmp_path: Path, scheme: str, strips: bool) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make_marking_folder(tmp_path / "folder", HEADERS, scheme, strips)
    expected = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(LONG, return_dict=True)
    tokens, roles = find_chat_template(folder).encode(load_tokenizer(folder), LONG)
    assert tokens.tolist() == expected["input_ids"] and set(roles.tolist()) == {0, 1, 2}
    tokenizer = load_tokenizer(folder, ["<extra>"])
    assert tokenizer.encode_markup(["a<extra> b"])[0].tolist().count(tokenizer.vocab_size - 1) == 1


def test_an_answer_is_what_follows_the_prompt_for_it() -> None:
    assert roles_by_text(ChatTemplate(HEADERS, {}, "here"), LONG) == [
        ("<|im_start|>system\nYou know pain.<|im_end|>\n", "SYSTEM"),
        ("<|im_start|>user\nwhat helps against pain?<|im_end|>\n", "PROMPTER"),
        ("<|im_start|>assistant\n", "PROMPTER"),
        ("aspirin helps,\n\nrest as well.<|im_end|>\n", "ASSISTANT"),
        ("<|im_start|>user\n日本語 and \u00e9<|im_end|>\n", "PROMPTER"),
        ("<|im_start|>assistant\n", "PROMPTER"),
        ("rest.<|im_end|>\n", "ASSISTANT"),
    ]


def test_a_system_that_is_folded_into_the_question_is_part_of_it() -> None:
    template = ChatTemplate(FOLDED, {"bos_token": "<s>", "eos_token": "</s>"}, "here")
    assert roles_by_text(template, LONG) == [
        ("<s>[INST] <<SYS>>\nYou know pain.\n<</SYS>>\n\nwhat helps against pain? [/INST]", "PROMPTER"),
        (" aspirin helps,\n\nrest as well. </s>", "ASSISTANT"),
        ("<s>[INST] 日本語 and \u00e9 [/INST]", "PROMPTER"),
        (" rest. </s>", "ASSISTANT"),
    ]


def test_tokens_of_the_assistant_are_what_a_model_would_have_to_say(tmp_path: Path) -> None:
    """Given the tokens of the text before an answer, its tokens follow, where one lies across the seam as well."""
    folder = make_folder(tmp_path / "folder", "{% for m in messages %}{{ m.content }}{% endfor %}")
    template, tokenizer = find_chat_template(folder), load_tokenizer(folder)
    messages = talk((USER, "what helps against pa"), (ASSISTANT, "in ?\n"), (USER, "\n"))
    tokens, roles = (part.tolist() for part in template.encode(tokenizer, messages))
    question = tokenizer.encode("what helps against pa")
    first = roles.index(Role.ASSISTANT)
    assert tokens[:first] == question[:first] and tokens != question[:first] + tokenizer.encode("in ?\n\n")
    assert tokenizer.decode(tokens[:first]) == "what helps against", "the token of ` pain` lies across the seam"
    # The token ` ?\n\n` lies across the seam behind the answer, and belongs to what follows.
    assert tokenizer.decode([t for t, role in zip(tokens, roles, strict=True) if role == Role.ASSISTANT]) == " pain"
    assert roles[-1] == Role.PROMPTER


def test_a_template_without_a_prompt_for_answers_gives_whole_messages() -> None:
    source = HEADERS.replace("{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}", "")
    assert "generation" not in source
    assert roles_by_text(ChatTemplate(source, {}, "here"), SHORT) == [
        ("<|im_start|>user\nwhat helps?<|im_end|>\n", "PROMPTER"),
        ("<|im_start|>assistant\naspirin.<|im_end|>\n", "ASSISTANT"),
    ]
    # A prompt that the whole does not have: as if there were none.
    other = HEADERS.replace("assistant\n' }}{%- endif", "assistant\n<think>' }}{%- endif")
    assert roles_by_text(ChatTemplate(other, {}, "here"), SHORT)[1] == (
        "<|im_start|>assistant\naspirin.<|im_end|>\n",
        "ASSISTANT",
    )


def test_what_a_template_refuses_is_said() -> None:
    template = ChatTemplate(FOLDED, {"bos_token": "<s>", "eos_token": "</s>"}, "here")
    with pytest.raises(RefusedLine, match="template of here refuses it: questions and answers must take turns"):
        template.parts(talk((ASSISTANT, "hello"), (USER, "hello")))
    for source, why in (
        ("{{ messages[0].name + 'x' }}", "no attribute 'name'"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ strftime_now('%d') }}", "'strftime_now' is undefined"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|__class__"),
    ):
        with pytest.raises(RefusedLine, match=f"refuses it: .*{why}"):
            ChatTemplate(source, {}, "here").parts(SHORT)
    with pytest.raises(RefusedLine, match="marks no answer"):
        ChatTemplate("{% if false %}{% generation %}x{% endgeneration %}{% endif %}y", {}, "here").parts(SHORT)
    with pytest.raises(RefusedLine, match=r"message 2 holds U\+FDD0"):
        ChatTemplate(HEADERS, {}, "here").parts(talk((USER, "a"), (ASSISTANT, "b\ufdd1")))


def test_what_is_no_template_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"template of here cannot be read: .*\(line 2\)"):
        ChatTemplate("{{ messages }}\n{% for %}", {}, "here")
    folder = make_folder(tmp_path / "folder", "")
    config = folder / "tokenizer_config.json"
    config.write_text("{}")
    with pytest.raises(ConfigError, match=r"folder has no chat template .*--chat-template: a file, or megatron-llm"):
        find_chat_template(folder / "tokenizer.json")
    config.write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json cannot be read as JSON"):
        find_chat_template(folder)
    with pytest.raises(DataError, match=r"nowhere.jinja cannot be read"):
        read_chat_template(tmp_path / "nowhere.jinja", folder)


def test_templates_are_found_where_tokenizers_keep_them(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", "config {{ bos_token }}{{ eos_token }}")
    assert find_chat_template(folder).parts(SHORT[:1])[0] == "config <s></s>"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "of several"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert find_chat_template(folder / "tokenizer.json").parts(SHORT[:1])[0] == "of several"
    (folder / "chat_template.jinja").write_text("of its own {{ eos_token }}")
    assert find_chat_template(folder).parts(SHORT[:1])[0] == "of its own </s>"
