"""JSON lines to pairs: ids, order, worker counts, refusals, bad lines, and what interruption leaves."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece

from megatron.data import encode, jsonl
from megatron.data.indexed import IndexedReader, IndexedWriter
from megatron.data.preprocess import PreprocessOptions, preprocess, progress, reading, run
from megatron.data.preprocess.quarantine import parse_budget
from megatron.data.provenance import read_provenance, source_line
from megatron.data.workers import encode_in_workers
from megatron.utils.errors import ConfigError, DataError, MegatronError, ResourceError

TEXTS = [
    "the patient was given aspirin",
    "",
    "pain\n\nand  fever ",
    "日本 µg </s> <s>",
    "rest <x> in the ward",
    "\u00e9",
]


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents_of(prefix: str) -> list[list[int]]:
    reader = IndexedReader(prefix)
    assert reader.document_index.tolist() == list(range(len(reader) + 1))
    return [reader.read(i).tolist() for i in range(len(reader))]


def sha256_of(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def small_chunks(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(run, "CHUNK_BYTES", chunk_bytes)  # how many workers are worth starting
    monkeypatch.setattr(reading.read_chunks, "__defaults__", (chunk_bytes,))


@pytest.fixture
def options(tmp_path: Path, tiny_tokenizer: Path) -> PreprocessOptions:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in TEXTS])
    (tmp_path / "out").mkdir()
    return PreprocessOptions((corpus,), str(tmp_path / "out/p"), tiny_tokenizer)


def written(options: PreprocessOptions) -> list[str]:
    return sorted(path.name for path in Path(options.output_prefix).parent.iterdir())


def test_documents_are_the_tokenizers_ids_without_the_empty_ones(
    options: PreprocessOptions, tiny_tokenizer: Path
) -> None:
    (pair,) = preprocess(options)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer))
    expected = [processor.encode(text) for text in TEXTS if text]
    assert documents_of(f"{options.output_prefix}_text_document") == expected
    assert (pair.documents, pair.tokens) == (5, sum(map(len, expected)))
    assert written(options) == ["p_text_document.bin", "p_text_document.idx", "p_text_document.json"]


def test_end_of_document_and_extra_tokens(options: PreprocessOptions, tiny_tokenizer: Path) -> None:
    options = replace(options, append_eod=True, eod_token="<eod>", extra_tokens=("<x>", "<eod>"))
    preprocess(options)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer))
    documents = documents_of(f"{options.output_prefix}_text_document")
    assert all(document[-1] == 341 and 341 not in document[:-1] for document in documents)
    assert documents[3] == [*processor.encode("rest "), 340, *processor.encode(" in the ward"), 341]
    provenance = read_provenance(f"{options.output_prefix}_text_document")
    assert provenance is not None
    assert (provenance.eod_id, provenance.vocabulary_size, provenance.added_tokens) == (341, 342, ["<x>", "<eod>"])


def test_the_default_end_of_document_is_the_end_of_sentence(options: PreprocessOptions) -> None:
    preprocess(replace(options, append_eod=True))
    assert [document[-1] for document in documents_of(f"{options.output_prefix}_text_document")] == [2] * 5
    preprocess(options)
    assert not any(2 in document for document in documents_of(f"{options.output_prefix}_text_document"))


def test_provenance_says_what_was_done(options: PreprocessOptions, tmp_path: Path, tiny_tokenizer: Path) -> None:
    second = write_jsonl(tmp_path / "second.jsonl", [{"text": "fever"}, {"text": ""}])
    options = replace(options, inputs=(*options.inputs, second), append_eod=True)
    preprocess(options)
    content = json.loads(Path(f"{options.output_prefix}_text_document.json").read_text())
    fingerprint = content.pop("tokenizer_fingerprint")
    assert len(fingerprint) == 64 and int(fingerprint, 16) > 0
    tokens = IndexedReader(f"{options.output_prefix}_text_document").num_tokens
    assert content == {
        "tokenizer": tiny_tokenizer.name,
        "vocabulary_size": 340,
        "added_tokens": [],
        "eod_id": 2,
        "append_eod": True,
        "json_key": "text",
        "dtype": "uint16",
        "documents": 6,
        "tokens": tokens,
        "sources": [
            {
                "file": str(file),
                "bytes": file.stat().st_size,
                "sha256": sha256_of(file),
                "documents": count,
                "lines": lines,
                "bad_lines": 0,
                "lines_without_document": "2",
            }
            for file, count, lines in zip(options.inputs, (5, 1), (6, 2), strict=True)
        ],
        "options": {"prepend_bos": False, "special_tokens": "text", "shard": None, "max_bad_lines": "0.1%"},
        "checksums": {
            "bin": [{"bytes": 2 * tokens, "sha256": sha256_of(f"{options.output_prefix}_text_document.bin")}],
            "idx": sha256_of(f"{options.output_prefix}_text_document.idx"),
        },
    }


def test_each_key_has_a_pair_and_they_need_not_align(options: PreprocessOptions, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"q": "pain", "a": ""}, {"q": "", "a": "rest"}, {"q": "fever", "a": "aspirin"}]
    options = replace(options, inputs=(write_jsonl(tmp_path / "qa.jsonl", rows),), json_keys=("q", "a"))
    pairs = preprocess(options)
    assert [(Path(pair.prefix).name, pair.documents) for pair in pairs] == [("p_q_document", 2), ("p_a_document", 2)]
    assert documents_of(f"{options.output_prefix}_q_document") != documents_of(f"{options.output_prefix}_a_document")


def test_output_does_not_depend_on_the_workers(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = " ".join(TEXTS).split()
    rows: list[dict[str, object]] = [
        {"text": " ".join(words[(i * j) % len(words)] for j in range(i % 90)), "n": i} for i in range(900)
    ]
    files = (write_jsonl(tmp_path / "one.jsonl", rows[:700]), write_jsonl(tmp_path / "two.jsonl", rows[700:]))
    options = replace(options, inputs=files, append_eod=True)
    outputs = {}
    small_chunks(monkeypatch, 2_000)
    for workers in (1, 3):
        prefix = str(tmp_path / f"out/w{workers}")
        preprocess(replace(options, output_prefix=prefix, workers=workers))
        outputs[workers] = [
            Path(f"{prefix}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")
        ]
    assert outputs[1] == outputs[3]
    assert IndexedReader(tmp_path / "out/w3_text_document").num_documents == 890


def test_bad_lines_beyond_the_budget_are_named_and_only_they_are_left(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ['{"text": "pain and fever"}\n'] * 500
    lines[321] = '{"text": 5}\n'
    lines[400] = "{\n"
    corpus = tmp_path / "bad.jsonl"
    corpus.write_text("".join(lines))
    small_chunks(monkeypatch, 1_000)
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"bad.jsonl, line 322: the value of 'text' is not text but a number; "):
            preprocess(replace(options, inputs=(corpus,), workers=workers))
        assert written(options) == ["p.quarantine.jsonl.partial"]
    preprocess(options)
    assert len(written(options)) == 3  # and these go when they are the past


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_lines_within_the_budget_are_kept_apart(
    options: PreprocessOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    workers: int,
) -> None:
    lines = [b'{"text": "pain and fever"}'] * 300
    bad = {
        7: (b"\xff\xfe", "not UTF-8"),
        150: (b'{"t": "' + b"x" * 9000 + b'"}', "no key 'text'"),
        299: (b"[", "not JSON"),
    }
    for place, (line, _) in bad.items():
        lines[place] = line
    lines[20] = b""
    (corpus := tmp_path / "some.jsonl").write_bytes(b"\n".join(lines))
    small_chunks(monkeypatch, 1_000)
    options = replace(options, inputs=(corpus,), workers=workers, max_bad_lines=parse_budget("1.01%"))
    with caplog.at_level(logging.INFO, logger="megatron"):
        (pair,) = preprocess(options)
    assert pair.documents == 296
    assert "some.jsonl, line 8: not UTF-8" in caplog.text and "3 of 299 lines were bad" in caplog.text
    kept = [json.loads(line) for line in Path(f"{options.output_prefix}.quarantine.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"], entry["bytes"]) for entry in kept] == [
        (str(corpus), place + 1, len(line)) for place, (line, _) in bad.items()
    ]
    assert all(reason in entry["reason"] for entry, (_, reason) in zip(kept, bad.values(), strict=True))
    assert kept[0]["raw_base64"] == "//4=" and kept[1]["raw"] == bad[150][0][:4096].decode()
    provenance = read_provenance(pair.prefix)
    assert provenance is not None
    assert provenance.sources[0]["lines_without_document"] == "8,21,151,300"
    assert (provenance.sources[0]["lines"], provenance.sources[0]["bad_lines"]) == (300, 3)
    for place, document in ((0, 0), (8, 7), (21, 19), (152 - 1, 148), (298, 295)):
        assert source_line(provenance, document) == (str(corpus), place + 1), document
    with pytest.raises(DataError, match="3 of 299 lines are bad, and --max-bad-lines 2 allows fewer"):
        preprocess(replace(options, max_bad_lines=parse_budget("2")))
    preprocess(replace(options, inputs=(tmp_path / "corpus.jsonl",)))
    assert not Path(f"{options.output_prefix}.quarantine.jsonl").exists()


def test_a_run_that_cannot_stay_within_the_budget_stops_early(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (corpus := tmp_path / "bad.jsonl").write_text('{"body": "another key, and much text under it"}\n' * 2000)
    small_chunks(monkeypatch, 1_000)
    with pytest.raises(DataError, match=r"line 1: no key 'text' \(it has 'body'\); .* of (\d{2,3}) lines are bad"):
        preprocess(replace(options, inputs=(corpus,)))


@pytest.mark.parametrize("text", ["many", "-1", "101%", "-1%", "0.1", "%"])
def test_a_budget_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--max-bad-lines {text}"):
        parse_budget(text)


def test_a_failed_run_leaves_the_pair_of_an_earlier_one(options: PreprocessOptions, tmp_path: Path) -> None:
    preprocess(options)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in written(options)}
    (tmp_path / "bad.jsonl").write_text("[]\n")
    with pytest.raises(DataError):
        preprocess(replace(options, inputs=(*options.inputs, tmp_path / "bad.jsonl")))
    (tmp_path / "out/p.quarantine.jsonl.partial").unlink()
    assert {name: (tmp_path / "out" / name).read_bytes() for name in written(options)} == before


def test_a_second_run_replaces_the_first(options: PreprocessOptions, tmp_path: Path) -> None:
    preprocess(replace(options, append_eod=True))
    shorter = write_jsonl(tmp_path / "shorter.jsonl", [{"text": "pain"}])
    (pair,) = preprocess(replace(options, inputs=(shorter,)))
    provenance = read_provenance(pair.prefix)
    assert provenance is not None
    assert (provenance.documents, provenance.append_eod) == (1, False)
    assert len(written(options)) == 3


def test_killed_while_replacing_a_pair_no_old_provenance_is_left(
    options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pair,) = preprocess(options)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        preprocess(replace(options, append_eod=True))
    assert read_provenance(pair.prefix) is None
    preprocess(replace(options, append_eod=True))  # goes on with giving names
    provenance = read_provenance(pair.prefix)
    assert provenance is not None and provenance.append_eod
    assert len(written(options)) == 3


def test_a_dead_worker_is_an_error_and_not_a_hang(options: PreprocessOptions, tmp_path: Path) -> None:
    chunk = jsonl.Chunk(tmp_path / "x", 1, b'{"text": "a"}')
    encoding = encode.Encoding(tmp_path / "gone.model", (), ("text",), None)
    with pytest.raises(ResourceError, match=r"there is no tokenizer at .*gone.model"):
        list(encode_in_workers([chunk] * 5, encoding, vocab_size=300, workers=1))
    encoding = encode.Encoding(options.tokenizer, (), ("text",), None, special_tokens="?")  # type: ignore[arg-type]
    with pytest.raises(ResourceError, match="worker process ended with exit code 1"):
        list(encode_in_workers([chunk] * 5, encoding, vocab_size=300, workers=1))
    encoding = encode.Encoding(options.tokenizer, (), ("text",), None)

    def chunks() -> Iterator[jsonl.Chunk]:
        for number in range(50):
            if number == 20:
                for child in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
            yield chunk

    with pytest.raises(ResourceError, match="worker process was killed by signal 9; if memory is short"):
        list(encode_in_workers(chunks(), encoding, vocab_size=300, workers=2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"workers": 0}, "--workers 0"),
        ({"json_keys": ("text", "text")}, "names a key twice"),
        ({"json_keys": ("a/b",)}, "cannot be part of a file name"),
        ({"eod_token": "<eod>", "append_eod": True}, "--eod-token '<eod>' is not in the vocabulary"),
        ({"eod_token": "</s>"}, "--eod-token </s> names the token that --append-eod appends: add --append-eod"),
        (
            {"inputs": (Path("/nonexistent/a.jsonl"), Path("/dev/null"))},
            r"a.jsonl \(not there\), /dev/null \(not a file\)",
        ),
        ({"output_prefix": "/proc/nowhere/p"}, "cannot write in the folder /proc/nowhere"),
        ({"output_prefix": "/tmp/"}, "not the first part of a file name"),
        ({"tokenizer": Path("/nonexistent")}, "no tokenizer at /nonexistent"),
        ({"extra_tokens": ("<a>", "<a>")}, "more than once"),
    ],
)
def test_what_cannot_work_is_refused_before_the_work(
    options: PreprocessOptions, change: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "read_chunks", lambda *_: pytest.fail("the work was begun"))
    with pytest.raises(MegatronError, match=said):
        preprocess(replace(options, **change))
    assert written(options) == []


def test_a_folder_where_the_pair_is_to_be_is_refused_before_the_work(
    options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "read_chunks", lambda *_: pytest.fail("the work was begun"))
    Path(f"{options.output_prefix}_text_document.idx").mkdir()
    with pytest.raises(DataError, match=r"p_text_document.idx is a folder"):
        preprocess(options)


def test_a_name_that_is_not_utf8_is_kept(options: PreprocessOptions, tmp_path: Path) -> None:
    corpus = options.inputs[0].rename(tmp_path / os.fsdecode(b"c\xff.jsonl"))
    preprocess(replace(options, inputs=(corpus,)))
    provenance = read_provenance(f"{options.output_prefix}_text_document")
    assert provenance is not None and source_line(provenance, 0) == (str(corpus), 1)


def test_the_same_file_twice_is_refused(options: PreprocessOptions, tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(options.inputs[0])
    with pytest.raises(ConfigError, match=r"same file twice .*corpus.jsonl and .*link.jsonl"):
        preprocess(replace(options, inputs=(*options.inputs, tmp_path / "link.jsonl")))


def test_an_input_is_never_overwritten(options: PreprocessOptions, tmp_path: Path) -> None:
    corpus = options.inputs[0].rename(tmp_path / "out/p_text_document.json")
    with pytest.raises(ConfigError, match=r"p_text_document.json is an input"):
        preprocess(replace(options, inputs=(corpus,)))
    assert written(options) == ["p_text_document.json"]


def test_an_empty_file_among_others_is_a_warning_and_alone_an_error(
    options: PreprocessOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with caplog.at_level(logging.WARNING, logger="megatron"):
        (pair,) = preprocess(replace(options, inputs=(empty, *options.inputs)))
    assert "empty.jsonl is empty" in caplog.text
    assert pair.documents == 5
    for path in map(Path, (f"{pair.prefix}{suffix}" for suffix in (".bin", ".idx", ".json"))):
        path.unlink()
    with pytest.raises(DataError, match="has any tokens under 'text'"):
        preprocess(replace(options, inputs=(empty,), workers=2))
    assert written(options) == []


def test_a_full_disk_is_one_error_and_leaves_nothing(
    options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexedWriter, "add_documents", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        preprocess(options)
    assert written(options) == []


def test_progress_is_told_with_rates(
    options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "_LOG_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO, logger="megatron"):
        preprocess(options)
    line, pair, end = (record.getMessage() for record in caplog.records if ".preprocess." in record.name)
    assert "(100 %)" in line and "MB/s" in line and "tokens/s" in line
    assert "5 documents" in pair and "1 texts had no tokens" in pair
    assert "MB/s" in end


@pytest.mark.parametrize(
    ("number", "code", "after_s"),
    [(signal.SIGINT, 130, 0.0), (signal.SIGINT, 130, 0.5), (signal.SIGTERM, 143, 0.5)],  # 0: workers are starting
)
def test_interrupted_from_outside_it_leaves_nothing(
    options: PreprocessOptions, tmp_path: Path, number: int, code: int, after_s: float
) -> None:
    corpus = tmp_path / "big.jsonl"
    corpus.write_text((json.dumps({"text": "the patient was given aspirin " * 4000}) + "\n") * 400)  # for ten seconds
    command = [
        sys.executable, "-m", "megatron", "preprocess", "--input", str(corpus), "--output-prefix",
        options.output_prefix, "--tokenizer", str(options.tokenizer), "--workers", "2",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not any(name.endswith(".bin.partial") for name in written(options)):
        assert process.poll() is None and time.monotonic() < deadline, "the work did not begin"
        time.sleep(0.02)
    time.sleep(after_s)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert written(options) == []
