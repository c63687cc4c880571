"""The same rows in every form of input give the same pair; and what is told on a terminal."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.data.indexed import IndexedReader
from megatron.data.preprocess import PreprocessOptions, preprocess, reading, run
from megatron.data.preprocess.inputs import find_sources, parse_shard, take_shard
from megatron.data.preprocess.quarantine import parse_budget
from megatron.data.preprocess.reading import read_chunks, start_of
from megatron.data.provenance import read_provenance, source_line
from megatron.utils.errors import DataError

from .test_reading import PACKERS, jsonl_of

TEXTS = [f"the patient {number} was given aspirin µg " * (number % 5) for number in range(240)]


@pytest.fixture
def options(tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> PreprocessOptions:
    monkeypatch.setattr(run, "CHUNK_BYTES", 500)
    monkeypatch.setattr(reading.read_chunks, "__defaults__", (500,))
    (tmp_path / "plain.jsonl").write_bytes(jsonl_of(TEXTS))
    return PreprocessOptions((tmp_path / "plain.jsonl",), str(tmp_path / "out/p"), tiny_tokenizer, append_eod=True)


def pair_of(options: PreprocessOptions) -> tuple[bytes, bytes]:
    (pair,) = preprocess(options)
    return Path(pair.prefix + ".bin").read_bytes(), Path(pair.prefix + ".idx").read_bytes()


def test_every_form_of_input_gives_the_same_pair(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pair_of(options)
    for kind, pack in PACKERS.items():
        (tmp_path / "packed").write_bytes(pack(jsonl_of(TEXTS)))
        assert pair_of(replace(options, inputs=(tmp_path / "packed",))) == expected, kind
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/1.jsonl").write_bytes(jsonl_of(TEXTS[:100]))
    (tmp_path / "parts/2.jsonl.gz").write_bytes(gzip.compress(jsonl_of(TEXTS[100:150])))
    write_parquet(tmp_path / "parts/3.parquet", TEXTS[150:])
    assert pair_of(replace(options, inputs=(tmp_path / "parts",), workers=2)) == expected
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(gzip.compress(jsonl_of(TEXTS)))))
    assert pair_of(replace(options, inputs=(Path("-"),))) == expected
    os.mkfifo(tmp_path / "pipe")
    feeder = subprocess.Popen(["sh", "-c", f"cat '{tmp_path}/plain.jsonl' > '{tmp_path}/pipe'"])
    assert pair_of(replace(options, inputs=(tmp_path / "pipe",))) == expected
    assert feeder.wait(timeout=60) == 0


def write_parquet(path: Path, texts: list[str | None], **more: object) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"text": texts, "n": list(range(len(texts)))}
    parquet.write_table(pyarrow.table(columns), path, row_group_size=37, **more)
    return path


@pytest.mark.parametrize("more", [{}, {"use_dictionary": False, "compression": "zstd"}, {"data_page_version": "2.0"}])
def test_rows_of_parquet_are_lines(options: PreprocessOptions, tmp_path: Path, more: dict[str, object]) -> None:
    texts: list[str | None] = [None if number % 50 == 7 else text for number, text in enumerate(TEXTS)]
    file = write_parquet(tmp_path / "a.parquet", texts, **more)
    (pair,) = preprocess(replace(options, inputs=(file,), max_bad_lines=parse_budget("100%")))
    provenance = read_provenance(pair.prefix)
    assert provenance is not None
    with_tokens = [number + 1 for number, text in enumerate(texts) if text]
    assert [source_line(provenance, document) for document in range(pair.documents)] == [
        (str(file), line) for line in with_tokens
    ]
    (source,) = find_sources([file])
    for count in (1, 2, 5, 300):
        rows = []
        for index in range(count):
            for part in take_shard([source], parse_shard(f"{index}/{count}")):
                for chunk, position in read_chunks(part, ["text"], start_of(part), lambda _: None, 500):
                    rows += list(range(part.begin + chunk.first_line, part.begin + position.lines + 1))
        assert rows == list(range(1, len(TEXTS) + 1))
    chunks = list(read_chunks(source, ["text"], start_of(source), lambda _: None, 500))
    for _, position in chunks[::3]:
        rest = list(read_chunks(source, ["text"], position, lambda _: None, 700))
        assert sum(position.lines for _, position in rest[-1:]) in (0, len(TEXTS))
        assert [chunk.first_line for chunk, _ in rest[:1]] in ([], [position.lines + 1])


def test_parquet_that_cannot_be_read_is_named(options: PreprocessOptions, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", list(TEXTS), write_page_checksum=True)
    for key, said in (
        ("body", r"a.parquet has no column 'body' \(it has 'text', 'n'\)"),
        ("n", "is not text but int64"),
    ):
        with pytest.raises(DataError, match=said):
            preprocess(replace(options, inputs=(file,), json_keys=(key,)))
    content = file.read_bytes()
    for damaged in (content[:-9], content[:300] + b"\xff" * 40 + content[340:]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a.parquet cannot be read as parquet after row \d+"):
            preprocess(replace(options, inputs=(file,)))
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), file)
    with pytest.raises(DataError, match="has several columns 'text'; rename all but one"):
        preprocess(replace(options, inputs=(file,)))


def test_on_a_terminal_one_line_is_updated(options: PreprocessOptions, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_bytes(jsonl_of(TEXTS * 20))
    program = "import sys; from megatron.data.preprocess import progress; progress._REDRAW_EVERY_S = 0.0; "
    program += "from megatron.__main__ import main; sys.exit(main(sys.argv[1:]))"
    words = ["preprocess", "--input", str(tmp_path / "long.jsonl"), "--output-prefix", options.output_prefix]
    words += ["--tokenizer", str(options.tokenizer), "--workers", "1"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", program, *words], stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how the end of a terminal is told
        while block := os.read(ours, 1 << 16):
            shown += block
    os.close(ours)
    assert process.wait(timeout=60) == 0
    lines = shown.decode().split("\r")
    bars = [line for line in lines if line.startswith("[")]
    assert bars and all(line.endswith("\x1b[K") for line in bars)
    assert "MB/s" in bars[-1] and "tokens/s" in bars[-1]
    assert any("wrote" in line and "documents" in line for line in lines)
    assert IndexedReader(f"{options.output_prefix}_text_document").num_documents > 0
