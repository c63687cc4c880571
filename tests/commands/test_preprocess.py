"""`megatron preprocess` from the command line: every option reaches the work, and errors are one message."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.__main__ import main
from megatron.data.indexed import IndexedReader
from megatron.data.provenance import read_provenance


@pytest.fixture
def words(shared: Path, tmp_path: Path) -> list[str]:
    """A whole command line but for the options under test."""
    rows = [{"title": "Fever <x>", "body": "The patient rests."}, {"title": "", "body": "No sign of harm."}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = shared / "data/stories260K-untied"
    return [
        "preprocess", "--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "new/folder/p"),
        "--tokenizer", str(tokenizer), "--json-keys", "title", "body",
    ]  # fmt: skip


def test_every_option_reaches_the_work(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    options = ["--workers", "1", "--append-eod", "--eod-token", "<y>", "--extra-tokens", "<x>,<y>"]
    assert main(words + options) == 0
    assert signal.getsignal(signal.SIGTERM) == before
    title = IndexedReader(tmp_path / "new/folder/p_title_document")
    assert len(title) == 1
    assert title.read(0)[-2:].tolist() == [512, 513]
    assert len(IndexedReader(tmp_path / "new/folder/p_body_document")) == 2
    provenance = read_provenance(tmp_path / "new/folder/p_body_document")
    assert provenance is not None
    assert (provenance.append_eod, provenance.eod_id, provenance.added_tokens) == (True, 513, ["<x>", "<y>"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2 documents" in captured.err and "tokens/s" in captured.err


def test_without_options_the_defaults_apply(words: list[str], tmp_path: Path) -> None:
    assert main(words) == 0
    provenance = read_provenance(tmp_path / "new/folder/p_body_document")
    assert provenance is not None
    assert (provenance.append_eod, provenance.eod_id, provenance.added_tokens) == (False, 2, [])


def test_errors_are_one_line_and_exit_code_2(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"title": "a", "body": 3}\n')
    process = subprocess.run([sys.executable, "-m", "megatron", *words], capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    assert process.stdout == ""
    assert "Traceback" not in process.stderr
    assert [line for line in process.stderr.splitlines() if not line.startswith("encoding by ")] == [
        process.stderr.splitlines()[-1]
    ]
    assert "in.jsonl, line 1: the value of 'body' is not text but a number" in process.stderr
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["p.quarantine.jsonl.partial"]


@pytest.mark.parametrize(
    ("option", "value", "hint"),
    [
        ("--input", "", "one of the names is empty"),
        ("--output-prefix", "", "is not the first part of a file name; give one, as in corpus"),
        ("--output-prefix", "x" * 300, "File name too long"),
        ("--messages-key", "talk", "--messages-key is for conversations: add --chat"),
    ],
)
def test_names_that_cannot_be(
    words: list[str], option: str, value: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)  # which holds a file of JSON lines: an empty name must not mean this folder
    given = [*words, option, value]
    assert main(given) == 2
    assert hint in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.bin*"))


def test_nothing_on_standard_input_is_called_that(words: list[str]) -> None:
    words[words.index("--input") + 1] = "-"
    process = subprocess.run(
        [sys.executable, "-m", "megatron", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 2
    assert "no line of standard input has any tokens" in process.stderr
