"""Megatron-LLM's tool for instruction data: its documented command lines as they stand, its tokens and roles."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron.data.indexed import IndexedReader
from megatron.data.instruction.pair import ConversationPair
from megatron.utils.errors import ConfigError
from tests.tools.test_preprocess_data import LIST, by_the_rules, run
from tools.preprocess_instruct_data import words_of_verb

TAGS = ["<|im_start|>", "<|im_end|>"]
# As the guide and Meditron's pages have them, with other paths.
GUIDE = (
    "python tools/preprocess_instruct_data.py --input={data} --output_prefix={out}/orca "
    "--tokenizer_type=SentencePieceTokenizer --vocab_file={model} --chunk_size=32 --workers=32 "
    '--vocab_extra_ids_list "<|im_start|>,<|im_end|>" --question_key=question --answer_key=response '
    "--system_key=system_prompt"
)
MEDITRON = (
    "python tools/preprocess_instruct_data.py --input {data} --output_prefix={out}/orca "
    "--tokenizer_type=SentencePieceTokenizer --vocab_file={model} --chunk_size=32 --workers=32 "
    f'--vocab_extra_ids_list "{LIST},<|im_start|>,<|im_end|>" --question_key=prompt --answer_key=gold'
)
QUESTIONS = ["What helps against <s>pain</s>?", "  [bib] a\n\nb ", "µg <PAD>", "Who <|im_end|> knows?"]


@pytest.fixture
def model(shared: Path) -> Path:
    return shared / "data/tokenizers/mistral_v1_tokenizer.model"  # 32,000 pieces with Llama-2's special ids


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def expected(
    model: Path, line: dict[str, str | None], keys: tuple[str, ...], listed: list[str]
) -> tuple[list[int], list[int]]:
    tokens, roles = list[int](), list[int]()
    for word, role, key in zip(("system", "question", "answer"), range(3), ("", *keys)[-3:], strict=True):
        if key and line[key] is not None:
            ids = by_the_rules(model, f"<|im_start|>{word}\n{line[key]}<|im_end|>\n", True, 0, listed)
            tokens += ids
            roles += [role] * len(ids)
    return tokens, roles


@pytest.mark.parametrize(
    ("command", "keys", "listed"),
    [
        (GUIDE, ("system_prompt", "question", "response"), TAGS),
        (MEDITRON, ("prompt", "gold"), [*LIST.split(","), *TAGS]),
    ],
    ids=["guide", "meditron"],
)
def test_documented_lines_give_megatron_llms_files(
    tmp_path: Path, model: Path, command: str, keys: tuple[str, ...], listed: list[str]
) -> None:
    systems = ["", "You know.", None, " x "]
    lines = [
        dict(zip(keys, values[-len(keys) :], strict=True))
        for values in zip(systems, QUESTIONS, ["rest", "a\n", " fever", "<CLS>"], strict=True)
    ]
    data = write_lines(tmp_path / "data.jsonl", lines)
    result = run(command.format(data=data, out=tmp_path, model=model))
    assert result.returncode == 0, result.stderr
    pair = ConversationPair(str(tmp_path / "orca"))
    assert len(pair) == len(lines)
    for number, line in enumerate(lines):
        tokens, roles = pair.read(number, 10**6)
        assert (tokens.tolist(), roles.tolist()) == expected(model, line, keys, listed)
    # Both of Megatron-LLM's dtypes, and document indices that Megatron Core accepts as well.
    for name in ("text", "role"):
        reader = IndexedReader(tmp_path / f"orca-{name}")
        assert reader.dtype == "<u2" and reader.document_index.tolist() == list(range(len(lines) + 1))


def test_flags_become_words_of_the_verb(tmp_path: Path, model: Path) -> None:
    line = "--input a b --output-prefix c --tokenizer_type SentencePieceTokenizer --vocab_file " + str(model)
    words = words_of_verb(shlex.split(line))
    assert words[:5] == ["preprocess", "--chat", "--chat-template", "megatron-llm", "--input"]
    assert words[words.index("--question-key") : words.index("--tokenizer")] == [
        "--question-key", "input", "--answer-key", "output",
    ]  # fmt: skip
    assert "--eod-token" not in words and "--workers" not in words
    with pytest.raises(ConfigError, match="only mmap is written"):
        words_of_verb(shlex.split(line + " --dataset_impl=lazy"))
    with pytest.raises(ConfigError, match="unrecognized arguments: --append_eod"):
        words_of_verb(shlex.split(line + " --append_eod"))


def test_tags_that_were_not_added_are_an_error(tmp_path: Path, model: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [{"input": "a", "output": "b"}])
    command = f"python tools/preprocess_instruct_data.py --input {data} --output_prefix {tmp_path}/o --tokenizer_type"
    result = run(f"{command} SentencePieceTokenizer --vocab_file {model}")
    assert result.returncode == 2 and "add them with --extra-tokens" in result.stderr
    assert "Traceback" not in result.stderr and not list(tmp_path.glob("o*"))
