"""`megatron dataset` from the command line, on what `megatron preprocess` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.__main__ import main

TEXTS = ["The patient rests.", "No sign of harm, and no fever.", "A day in the ward.", "Rest and aspirin for the pain."]
LINES = [1, 3, 6, 7]  # of a file in which others are blank or have no text


@pytest.fixture
def prefix(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    rows = ["", *(json.dumps({"text": text}) for text in TEXTS)]
    order = [1, 0, 2, 0, 0, 3, 4]
    (tmp_path / "in.jsonl").write_text("".join(rows[number] + "\n" for number in order))
    words = ["--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "p", "--workers", 1]
    words += ["--tokenizer", shared / "data/stories260K-untied", "--append-eod"]
    assert main(["preprocess", *map(str, words)]) == 0
    capsys.readouterr()
    return str(tmp_path / "p_text_document")


def test_documents_are_decoded_with_their_lines(prefix: str, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = str(shared / "data/stories260K-untied")
    assert main(["dataset", "sample", prefix, "--documents", "9", "--tokenizer", tokenizer]) == 0
    text = capsys.readouterr().out
    for number, (content, line) in enumerate(zip(TEXTS, LINES, strict=True)):
        assert f"--- document {number}, " in text and f"line {line}\n{content}" in text
    assert main(["dataset", "sample", prefix, "--first", "2", "--documents", "1", "--tokens", "3"]) == 0
    header, ids = capsys.readouterr().out.splitlines()
    assert header.startswith("--- document 2, ") and header.endswith("line 6")
    assert len(ids.split()) == 4 and ids.endswith(" …")
    assert main(["dataset", "sample", prefix, "--documents", "2", "--seed", "1"]) == 0
    assert capsys.readouterr().out.count("--- document") == 2


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--first", "4"], "has 4 documents, from 0"),
        (["--documents", "0"], "ask for one or more"),
        (["--seed", "-1"], "--seed -1 is negative"),
        (["--data.train=x"], "takes no keys of the configuration"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_errors(prefix: str, words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset", "sample", prefix, *words]) == 2
    assert hint in capsys.readouterr().err


def test_another_tokenizer_is_noticed(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(Path(prefix + ".json").read_text())
    content["tokenizer_fingerprint"] = "00" * 32
    Path(prefix + ".json").write_text(json.dumps(content))
    tokenizer = str(Path(__file__).parents[3] / "shared/data/stories260K-untied")
    assert main(["dataset", "sample", prefix, "--tokenizer", tokenizer]) == 2
    assert "was made with another tokenizer" in capsys.readouterr().err
    Path(prefix + ".json").unlink()
    content = Path(prefix + ".bin").read_bytes()
    Path(prefix + ".bin").write_bytes(b"\xff\xff" + content[2:])
    assert main(["dataset", "sample", prefix, "--first", "0", "--tokenizer", tokenizer]) == 2
    assert "document 0 of" in (said := capsys.readouterr().err) and "holds the token 65535, which" in said


def test_a_step_is_traced_to_the_lines_of_the_text(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "tiny", "--data.train", prefix, "--data.sequence_length", "12", "--data.order", "stable"]
    words += ["--train.global_batch", "4", "--processes", "2", "--rank", "1", "--step", "1"]
    assert main(["dataset", "explain", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["data_rank"], told["data_ranks"], told["position"], len(told["rows"])) == (1, 2, 0, 2)
    for row in told["rows"]:
        for excerpt in row["excerpts"]:
            assert Path(excerpt["file"]).name == "in.jsonl"
            assert excerpt["line"] == LINES[excerpt["document"]]
    assert main(["dataset", "explain", *words]) == 0
    assert "in.jsonl line" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--step", "0", "--processes", "1"], "there is no step 0"),
        (["--step", "99", "--train.steps", "98", "--processes", "1"], "steps of the run are 1 to 98 (train.steps=98)"),
        (["--step", "1", "--processes", "0"], "--processes 0 is not a number of processes"),
        (["--step", "1", "--processes", "1", "--position", "-5"], "--position -5 is negative"),
        (["--step", "1", "--processes", "1", "--rank", "-1"], "there is no rank -1"),
    ],
)
def test_what_cannot_be_explained(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset", "explain", "--config", "tiny", *words]) == 2
    assert hint in capsys.readouterr().err


def test_the_ledger_of_a_run(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "tiny", "--data.train", prefix, "--data.sequence_length", "12", "--train.global_batch", "4"]
    assert main(["dataset", "ledger", *words, "--step", "3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("after step 3: 12 samples\n") and "144 tokens" in text and prefix in text
    assert main(["dataset", "ledger", *words, "--position", "12", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["samples"], told["sources"][0]["tokens"]) == (None, 12, 144)
    for wrong, hint in (
        (["--step", "4", "--train.steps", "3"], "steps of the run are 0 to 3"),
        (["--step", "-1"], "there is no step -1"),
        (["--position", "-1"], "--position -1 is negative"),
        (["--position", "99999"], "--position 99999 is behind the end of the data"),
        (["--position", str(10**30)], "is more samples than any run reads"),
        (["--position", "1", "--step", "1"], "give one of them"),
    ):
        assert main(["dataset", "ledger", *words, *wrong]) == 2
        assert hint in capsys.readouterr().err


def test_a_configuration_that_is_not_the_runs_is_refused(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is read of it would not be what the run has read."""
    words = ["--config", "tiny", "--data.train", prefix, "--data.sequence_length", "12", "--data.order", "stable"]
    words += [
        "--train.micro_batch",
        "1",
        "--train.steps",
        "2",
        "--optimizer.warmup_steps",
        "0",
        "--checkpoint.save",
        str(tmp_path / "save"),
    ]
    assert main(["train", *words, "--train.global_batch", "2", "--evaluate.interval", "null"]) == 0
    other = {
        "--train.global_batch": ["4", "had read 4 samples after step 2, but by train.global_batch=4 these would have"],
        "--data.seed": ["7", "was trained on another order of samples: data.seed was 1234, now 7"],
    }
    for verb in (["ledger", "--step", "2"], ["explain", "--step", "1"]):
        assert main(["dataset", *verb, *words, "--train.global_batch", "2"]) == 0
        for key, (value, hint) in other.items():
            capsys.readouterr()
            assert main(["dataset", *verb, *words, "--train.global_batch", "2", key, value]) == 2
            assert hint in capsys.readouterr().err
        wanted = ["--position", "0", "--train.global_batch", "4"]
        verb = [word for word in verb if verb[0] == "explain" or word not in ("--step", "2")]
        assert main(["dataset", *verb, *words, *wanted]) == 0
