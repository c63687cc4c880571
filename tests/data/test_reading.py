"""Sources to chunks: however they are packed and cut, from any position on, and what is said of damaged ones."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.jsonl import Chunk, parse_chunk
from megatron.data.preprocess import archives, reading
from megatron.data.preprocess.inputs import STANDARD_INPUT, Source, find_sources, parse_shard, take_shard
from megatron.data.preprocess.reading import Position, ReadSource, read_chunks, start_of
from megatron.utils.errors import ConfigError, DataError, ResourceError


def zstandard(content: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(content)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstandard": zstandard,
}


def read_all(source: Source, position: Position | None = None, chunk_bytes: int = 64) -> list[tuple[Chunk, Position]]:
    return list(read_chunks(source, ["text"], position or start_of(source), lambda _: None, chunk_bytes))


def texts_of(chunks: Sequence[tuple[Chunk, Position]]) -> list[tuple[int, str]]:
    """(line, text) of every good line."""
    found = []
    for chunk, _ in chunks:
        parsed = parse_chunk(chunk, ["text"])
        found += [(chunk.first_line + place, text) for place, text in zip(parsed.places, parsed.texts[0], strict=True)]
    return found


def jsonl_of(texts: Sequence[str]) -> bytes:
    return b"\n".join(json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts)


@given(texts=st.lists(st.text(st.characters(codec="utf-8")), max_size=20), chunk_bytes=st.integers(1, 200))
@settings(max_examples=60)
def test_lines_come_whole_and_in_order_however_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], chunk_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_bytes(jsonl_of(texts))
    (source,) = find_sources([path])
    chunks = read_all(source, chunk_bytes=chunk_bytes)
    assert texts_of(chunks) == list(enumerate(texts, start=1))
    for _, position in chunks:  # from wherever it is gone on
        rest = read_all(source, position, chunk_bytes=chunk_bytes + 3)
        assert texts_of(rest) == list(enumerate(texts, start=1))[position.lines :]


@pytest.mark.parametrize("kind", PACKERS)
def test_packed_files_are_known_by_their_content(tmp_path: Path, kind: str) -> None:
    texts = [f"text {number} " * (number % 7) for number in range(300)]
    content = jsonl_of(texts) + b"\n"
    pack = PACKERS[kind]
    path = tmp_path / "misnamed.txt"
    half = len(content) // 2
    path.write_bytes(pack(content[:half]) + pack(content[half:]))  # two members
    (source,) = find_sources([path])
    assert source.kind == kind
    told: list[ReadSource] = []
    chunks = list(read_chunks(source, ["text"], start_of(source), told.append, 500))
    assert texts_of(chunks) == list(enumerate(texts, start=1))
    assert told == [ReadSource(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())]
    position = chunks[len(chunks) // 2][1]
    again = list(read_chunks(source, ["text"], position, told.append, 500))
    assert texts_of(again) == list(enumerate(texts, start=1))[position.lines :]
    assert told[1] == told[0]  # though only the rest was given


@pytest.mark.parametrize("kind", [kind for kind in PACKERS if kind != "plain"])
def test_no_damage_to_an_archive_goes_unseen(tmp_path: Path, kind: str) -> None:
    content = jsonl_of([os.urandom(40).hex() for _ in range(200)])
    packed = PACKERS[kind](content)
    middle = len(packed) // 2
    damaged = {
        "cut": packed[: len(packed) * 2 // 3],
        "cut in the last byte": packed[:-1],
        "changed": packed[:middle] + bytes([packed[middle] ^ 0x10]) + packed[middle + 1 :],
        "followed": packed + b'{"text": "not packed"}\n',
    }
    for what, archive in damaged.items():
        path = tmp_path / f"{what}.jsonl"
        path.write_bytes(archive)
        (source,) = find_sources([path])
        with pytest.raises(DataError, match=rf"{what}.jsonl is damaged or cut short near byte [\d,]+ of the file"):
            read_all(source)


def test_padding_behind_an_archive_is_let_pass(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(gzip.compress(b'{"text": "a"}\n') + bytes(512))
    assert texts_of(read_all(find_sources([tmp_path / "a"])[0])) == [(1, "a")]


def test_frames_that_hold_nothing_are_passed_over(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    (tmp_path / "a").write_bytes(skippable + zstandard(b'{"text": "a"}\n') + skippable + zstandard(b""))
    assert texts_of(read_all(find_sources([tmp_path / "a"])[0])) == [(1, "a")]


@pytest.mark.parametrize("kind", ["gzip", "xz", "bzip2"])
def test_an_archive_that_is_mostly_nothing_stays_small(tmp_path: Path, kind: str) -> None:
    (tmp_path / kind).write_bytes(PACKERS[kind](b" " * (32 << 20)))
    with open(tmp_path / kind, "rb") as file:
        stream = archives.TextStream(file, kind)
        blocks = [len(block) for block in iter(lambda: stream.read(1 << 16), b"")]
    assert (sum(blocks), max(blocks)) == (32 << 20, 1 << 16)


def test_a_zip_archive_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"PK\x03\x04....")
    with pytest.raises(DataError, match=r"a.jsonl is a zip archive, which is not read; unpack it"):
        find_sources([tmp_path / "a.jsonl"])


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_archive_is_refused_however_it_is_packed_and_named(
    tmp_path: Path, kind: str, dialect: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read as text it would lose the first line of each of its files."""
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "a"}\n' * 1000)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=dialect) as archive:
        archive.add(tmp_path / "in.jsonl", "\u00e9/in.jsonl")
    packed = PACKERS[kind](content.getvalue())
    (tmp_path / "a.jsonl").write_bytes(packed)
    with pytest.raises(DataError, match=r"a.jsonl is a tar archive, whose files are not told apart; unpack it"):
        find_sources([tmp_path / "a.jsonl"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(packed)))
    with pytest.raises(DataError, match="standard input is a tar archive"):
        read_all(find_sources(["-"])[0])
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "folder/a.tar")
    with pytest.raises(DataError, match=r"a\.tar is a tar archive"):
        find_sources([str(tmp_path / "folder/*.tar")])


@pytest.mark.parametrize(("window_log", "mantissa"), [(27, 0), (31, 0), (31, 1), (41, 7)])
def test_a_large_zstandard_window_is_read_or_refused(tmp_path: Path, window_log: int, mantissa: int) -> None:
    """`zstd --long=31` has a window of 2 GiB; a frame may ask for terabytes, whatever it holds. A window takes memory
    only as far as there is text."""
    pytest.importorskip("zstandard")
    text = b'{"text": "a"}\n' * 100
    block = (len(text) << 3 | 1).to_bytes(3, "little") + text  # stored, the last one
    (tmp_path / "a.zst").write_bytes(
        b"\x28\xb5\x2f\xfd" + bytes([0, (window_log - 10) << 3 | mantissa]) + block
    )  # no checksum, no length
    code = (
        "import resource, sys; from megatron.data.preprocess.archives import TextStream\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "stream = TextStream(open(sys.argv[1], 'rb'), 'a')\n"
        "print(sum(map(len, iter(lambda: stream.read(99), b''))))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000)"
    )
    if (window_log, mantissa) > (31, 0):
        with pytest.raises(ResourceError, match=r"a.zst needs more memory .* 2\.0 GiB of zstd --long=31"):
            read_all(find_sources([tmp_path / "a.zst"])[0])
        return
    assert len(texts_of(read_all(find_sources([tmp_path / "a.zst"])[0]))) == 100
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.zst")], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["1400", "True"]


@pytest.mark.parametrize(("kind", "package"), [("zstandard", "zstandard"), ("parquet", "pyarrow")])
def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str) -> None:
    (tmp_path / "a").write_bytes({"zstandard": b"\x28\xb5\x2f\xfd....", "parquet": b"PAR1...."}[kind])
    for name in (package, "compression", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        find_sources([tmp_path / "a"])


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}')
    ((_, position),) = chunks = read_all(find_sources([tmp_path / "a"])[0])
    assert texts_of(chunks) == [(1, "a"), (2, "b")]
    assert position == Position((tmp_path / "a").stat().st_size, 2, (tmp_path / "a").stat().st_size)


@pytest.mark.parametrize("count", [2, 3])
def test_a_byte_order_mark_within_a_file_is_not_taken_away_where_a_shard_begins(tmp_path: Path, count: int) -> None:
    """What a line is must not depend on how a file is divided, nor on where reading it goes on."""
    lines = [b'\xef\xbb\xbf{"text": "%d"}\n' % number for number in range(6)]
    (tmp_path / "a").write_bytes(b"".join(lines))
    (source,) = find_sources([tmp_path / "a"])
    whole = read_all(source, chunk_bytes=len(lines[0]))
    assert texts_of(whole) == [(1, "0")]  # the others are bad
    for _, position in whole:
        assert texts_of(read_all(source, position)) == []
    shards = [take_shard([source], parse_shard(f"{index}/{count}")) for index in range(count)]
    assert all(part.begin for (part,) in shards[1:])
    assert [texts_of(read_all(part)) for (part,) in shards] == [[(1, "0")], *[[]] * (count - 1)]


@pytest.mark.parametrize("chunk_bytes", [8, 50])
def test_a_line_that_is_too_long_is_counted_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(reading, "_KEPT_OF_OVERLONG_BYTES", 10)
    lines = [json.dumps({"text": "x" * length}).encode() for length in (3, 90, 86, 87, 5, 1000, 7)]
    for ending in (b"", b"\n"):
        (tmp_path / "a").write_bytes(b"\n".join(lines) + ending)
        (source,) = find_sources([tmp_path / "a"])
        chunks = read_all(source, chunk_bytes=chunk_bytes)
        overlong = [(chunk.first_line, chunk.overlong_bytes) for chunk, _ in chunks if chunk.overlong_bytes]
        assert overlong == [(2, len(lines[1]) + 1), (6, len(lines[5]) + 1)]
        assert [number for number, _ in texts_of(chunks)] == [1, 3, 4, 5, 7]
        assert chunks[-1][1].offset == source.num_bytes


def test_standard_input_is_read_once_packed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for pack in (bytes, gzip.compress):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(pack(b'{"text": "a"}\n{"text": "b"}'))))
        (source,) = find_sources(["-"])
        assert (source.file, source.is_stream) == (STANDARD_INPUT, True)
        assert texts_of(read_all(source)) == [(1, "a"), (2, "b")]
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="standard input is closed"):
        read_all(find_sources(["-"])[0])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"PAR1....")))
    with pytest.raises(DataError, match="standard input holds parquet"):
        read_all(find_sources(["-"])[0])


def test_folders_and_patterns_are_sorted_and_hold_inputs_only(tmp_path: Path) -> None:
    names = [
        "b.jsonl",
        "a.jsonl.gz",
        "c.json.zst",
        "d.ndjson",
        ".hidden.jsonl",
        "e.tar.gz",
        "notes.txt",
        "p.quarantine.jsonl",
    ]
    for name in [*names, "p_text_document.json", "p_text_document.idx"]:
        (tmp_path / name).write_bytes(b"{}\n")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper/z.jsonl").write_bytes(b"{}\n")
    assert [source.file.name for source in find_sources([tmp_path])] == [
        "a.jsonl.gz",
        "b.jsonl",
        "c.json.zst",
        "d.ndjson",
    ]
    names = [source.file.name for source in find_sources([str(tmp_path / "**/[bz].jsonl")])]
    assert names == ["b.jsonl", "z.jsonl"]
    with pytest.raises(DataError, match=r"\(no file matches\).*\(not there\)"):
        find_sources([str(tmp_path / "*.csv"), tmp_path / "gone"])
    with pytest.raises(DataError, match="File name too long"):
        find_sources(["x" * 300])
    with pytest.raises(DataError, match=r"no \.jsonl"):
        (tmp_path / "empty").mkdir()
        find_sources([tmp_path / "empty"])


def test_a_pattern_reads_the_folders_that_it_matches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Quoted or not, `corpus/*` is the same."""
    corpus = tmp_path / "corpus"
    for name in ("b.jsonl", "a/y.jsonl", "a/x.json", "a/deeper/z.jsonl", "a/.hidden.jsonl", "none/readme.md"):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_bytes(b"{}\n")

    def found(pattern: str) -> list[str]:
        return [str(source.file.relative_to(corpus)) for source in find_sources([str(corpus / pattern)])]

    assert found("*") == ["a/x.json", "a/y.jsonl", "b.jsonl"]
    assert "matches folders without input files" in caplog.text and str(corpus / "none") in caplog.text
    assert found("a/../*") == ["a/../a/x.json", "a/../a/y.jsonl", "a/../b.jsonl"]
    assert found("[a]") == [source.file.relative_to(corpus).as_posix() for source in find_sources([corpus / "a"])]
    assert found("**/*.jsonl") == ["a/deeper/z.jsonl", "a/y.jsonl", "b.jsonl"]
    (corpus / "none/readme.md").unlink()
    assert found("**") == ["a/deeper/z.jsonl", "a/x.json", "a/y.jsonl", "b.jsonl"]  # each once
    with pytest.raises(DataError, match=r"no\*e \(no file matches\)"):
        found("no*e")


def test_what_a_folder_holds_is_not_passed_over_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jsonl", "b.tar.gz", "c.zip", "d.tgz"):
        (tmp_path / name).write_bytes(b"{}\n")
    assert len(find_sources([tmp_path])) == 1
    assert "passed over archives, which are not read: b.tar.gz, c.zip, d.tgz; unpack them" in caplog.text
    (tmp_path / "e.jsonl").symlink_to(tmp_path / "gone")
    for word in (tmp_path, str(tmp_path / "*.jsonl")):
        with pytest.raises(DataError, match=r"e.jsonl \(a link to what is not there\)"):
            find_sources([word])


@pytest.mark.parametrize("text", ["3", "a/b", "-1/4", "4/4", "0/0", "1/"])
def test_a_shard_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--shard {text}"):
        parse_shard(text)


@given(
    lengths=st.lists(st.lists(st.integers(0, 60), max_size=12), min_size=1, max_size=4),
    packed=st.lists(st.booleans(), min_size=4, max_size=4),
    count=st.integers(1, 9),
)
@settings(max_examples=60)
def test_shards_in_order_are_all_lines_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], packed: list[bool], count: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    expected = []
    for number, (sizes, pack) in enumerate(zip(lengths, packed, strict=False)):
        texts = [f"{number}.{line}." + "x" * size for line, size in enumerate(sizes)]
        expected += texts
        (folder / f"{number}.jsonl").write_bytes((gzip.compress if pack else bytes)(jsonl_of(texts)))
    sources = find_sources(sorted(folder.iterdir()))
    found = []
    for index in range(count):
        for source in take_shard(sources, parse_shard(f"{index}/{count}")):
            found += [text for _, text in texts_of(read_all(source))]
    assert found == expected


def test_a_pipe_cannot_be_divided() -> None:
    with pytest.raises(ConfigError, match="--shard needs files"):
        take_shard(find_sources(["-"]), parse_shard("0/2"))
