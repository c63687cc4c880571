"""`megatron preprocess --chat`: whole runs on conversations, whatever the workers, the packing, and what is bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron.__main__ import main
from megatron.data.instruction.chat_template import find_chat_template
from megatron.data.instruction.pair import ConversationPair, role_prefix, text_prefix
from megatron.data.provenance import read_provenance
from megatron.tokenizer import load_tokenizer
from tests.data.conftest import tiny_tokenizer
from tests.data.instruction.templates import HEADERS, make_folder

__all__ = ["tiny_tokenizer"]

OUTPUTS = [f"orca-{name}.{ending}" for name in ("text", "role") for ending in ("bin", "idx")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model", HEADERS)


def conversation(number: int) -> list[dict[str, str]]:
    turns = [("system", "You know pain.")] if number % 3 == 0 else []
    for turn in range(1 + number % 2):
        turns += [("user", f"what helps {number}?"), ("assistant", f"aspirin {turn}, " + "rest " * (number % 7))]
    return [{"role": role, "content": content} for role, content in turns]


def write(path: Path, lines: list[Any]) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def preprocess(folder: Path, data: Path, out: Path, *more: Any, code: int = 0) -> Path:
    words = ["preprocess", "--chat", "--input", data, "--output-prefix", out / "orca", "--tokenizer", folder, *more]
    out.mkdir(exist_ok=True)
    assert main([str(word) for word in words]) == code
    return out


def contents(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in OUTPUTS]


def test_conversations_become_tokens_and_roles(tmp_path: Path, folder: Path) -> None:
    lines = [{"messages": conversation(number), "id": number} for number in range(40)]
    out = preprocess(folder, write(tmp_path / "data.jsonl", lines), tmp_path / "out")
    pair = ConversationPair(str(out / "orca"))
    template, tokenizer = find_chat_template(folder), load_tokenizer(folder)
    for number, line in enumerate(lines):
        tokens, roles = pair.read(number, 10**6)
        expected = template.encode(tokenizer, line["messages"])
        assert tokens.tolist() == expected[0].tolist() and roles.tolist() == expected[1].tolist()
    provenance = read_provenance(text_prefix(str(out / "orca")))
    assert provenance is not None and provenance.documents == 40 and provenance.json_key == "messages"
    assert provenance.tokenizer_fingerprint == tokenizer.fingerprint and provenance.options["chat"]["template"] is None
    assert read_provenance(role_prefix(str(out / "orca"))) is not None


def test_workers_archives_and_keys_change_nothing(tmp_path: Path, folder: Path) -> None:
    """4 MB, so that workers are started: the same bytes as without, from a packed file, and from texts under keys."""
    padding = "x" * 3000
    lines = [{"messages": [*conversation(6 * number + 1)[:2]], "padding": padding} for number in range(1400)]
    alone = preprocess(folder, write(tmp_path / "data.jsonl", lines), tmp_path / "alone", "--workers", 1)
    shared = preprocess(folder, tmp_path / "data.jsonl", tmp_path / "shared", "--workers", 3)
    packed = preprocess(folder, write(tmp_path / "data.jsonl.gz", lines), tmp_path / "packed", "--workers", 1)
    keyed = [{"q": line["messages"][0]["content"], "a": line["messages"][1]["content"]} for line in lines]
    texts = preprocess(
        folder, write(tmp_path / "keyed.jsonl", keyed), tmp_path / "texts", "--question-key", "q", "--answer-key", "a"
    )
    assert len(ConversationPair(str(alone / "orca"))) == 1400
    assert contents(alone) == contents(shared) == contents(packed) == contents(texts)


def test_columns_of_parquet_are_read(tmp_path: Path, folder: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    questions, answers = ["what helps?", "rest?", "why?"], ["aspirin.", "", "pain."]
    table = pyarrow.table({"q": questions, "a": answers})
    parquet.write_table(table, tmp_path / "data.parquet")
    options = ("--question-key", "q", "--answer-key", "a", "--max-bad-lines", "40%")
    found = preprocess(folder, tmp_path / "data.parquet", tmp_path / "out", *options)
    lines = [{"q": question, "a": answer} for question, answer in zip(questions, answers, strict=True)]
    other = preprocess(folder, write(tmp_path / "data.jsonl", lines), tmp_path / "other", *options)
    assert contents(found) == contents(other) and len(ConversationPair(str(found / "orca"))) == 2
    (bad,) = (json.loads(line) for line in (found / "orca.quarantine.jsonl").read_text().splitlines())
    assert "an answer is empty" in bad["reason"] and bad["line"] == 2


BAD = [
    ('{"messages": 3}', "not a list of messages but a number"),
    ("{", "not JSON"),
    ('{"messages": [{"role": "bot", "content": "a"}]}', "unknown role 'bot'"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "nothing to learn"),
    (
        '{"messages": [{"role": "user", "content": "a</s>"}, {"role": "assistant", "content": "b"}]}',
        "special token </s> written out",
    ),
]


def test_bad_lines_are_kept_apart_with_their_reasons(
    tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = [{"messages": conversation(number)} for number in range(20)]
    data = write(tmp_path / "data.jsonl", [*good[:9], *[line for line, _ in BAD], *good[9:]])
    preprocess(folder, data, tmp_path / "out", code=2)
    errors = capfd.readouterr().err
    assert "line 10: the value of 'messages' is not a list" in errors and "Traceback" not in errors
    assert "every line must be a JSON object with a list of messages (role, content) under 'messages'" in errors
    out = preprocess(folder, data, tmp_path / "out", "--max-bad-lines", 5)
    kept = [json.loads(line) for line in (out / "orca.quarantine.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in kept] == [10, 11, 12, 13, 14]
    for entry, (_, reason) in zip(kept, BAD, strict=True):
        assert reason in entry["reason"]
    alone = preprocess(folder, write(tmp_path / "good.jsonl", good), tmp_path / "good")
    assert contents(out) == contents(alone)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--append-eod"], "--append-eod with --chat: a template says how"),
        (["--question-key", "q"], "--question-key and --answer-key go together"),
        (["--json-keys", "a"], "--json-keys with --chat"),
        (["--messages-key", "m", "--question-key", "q", "--answer-key", "a"], "--messages-key and --question-key:"),
        (["--chat-template", "nowhere"], "nowhere cannot be read as a chat template"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str], options: list[str], why: str
) -> None:
    data = write(tmp_path / "data.jsonl", [{"messages": conversation(1)}])
    preprocess(folder, data, tmp_path / "out", *options, code=2)
    errors = capfd.readouterr().err
    assert why in errors and "Traceback" not in errors and not list((tmp_path / "out").iterdir())


def test_options_for_conversations_need_conversations(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["preprocess", "--input", "x", "--output-prefix", str(tmp_path / "o"), "--tokenizer", "t"]
    assert main([*words, "--system-key", "s"]) == 2
    assert "--system-key is for conversations: add --chat" in capfd.readouterr().err


def test_megatron_llms_template_needs_its_tags(
    tmp_path: Path, tiny_tokenizer: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.jsonl", [{"messages": conversation(1)}])
    options = ("--chat-template", "megatron-llm", "--extra-tokens", "<|im_start|>")
    preprocess(tiny_tokenizer, data, tmp_path / "out", *options, code=2)
    assert "<|im_end|> is no token of" in capfd.readouterr().err and not list((tmp_path / "out").iterdir())
    preprocess(tiny_tokenizer, data, tmp_path / "out", *options[:3], "<|im_start|>,<|im_end|>")
    assert len(ConversationPair(str(tmp_path / "out" / "orca"))) == 1
