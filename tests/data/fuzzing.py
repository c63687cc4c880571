"""Damaged inputs by the thousand: each must give an error of ours or what a plain reference reads, nothing else.

    python -m tests.data.fuzzing --inputs 100000

does that many and says what came out. The tests do a few thousand.
"""

from __future__ import annotations

import argparse
import bz2
import collections
import gzip
import io
import json
import lzma
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron.data import jsonl
from megatron.data.indexed import IndexedReader, IndexedWriter
from megatron.data.jsonl import parse_chunk
from megatron.data.preprocess.inputs import find_sources
from megatron.data.preprocess.reading import read_chunks, start_of
from megatron.data.provenance import Provenance, check_checksums, read_provenance, source_line, write_provenance
from megatron.utils.errors import MegatronError

_EXTREMES = (0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, -(2**63), 255, 65_535, 10**12)


def mutate(content: bytes, draw: random.Random) -> bytes:
    """The content with one to three changes: bits, bytes, numbers, pieces lost, doubled, moved or made up."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at = draw.randrange(len(data) + 1)
        length = min(draw.choice((1, 1, 2, 4, 8, 40)), len(data) - at)
        change = draw.randrange(8)
        if change == 0 and length:
            data[at] ^= 1 << draw.randrange(8)
        elif change == 1 and length:
            data[at] = draw.choice((0, 10, 34, 92, 123, 127, 128, 255))
        elif change == 2:
            del data[at : at + length]
        elif change == 3:
            data[at:at] = data[at : at + length]
        elif change == 4:
            data[at:at] = draw.randbytes(draw.randrange(9))
        elif change == 5:
            del data[at:]
        elif change == 6:
            number = struct.pack("<q", draw.choice(_EXTREMES))
            data[at : at + 8] = number[: max(0, len(data) - at)]
        else:
            moved = data[at : at + length]
            del data[at : at + length]
            to = draw.randrange(len(data) + 1)
            data[to:to] = moved
    return bytes(data)


class Fuzzer:
    """Whole inputs in a folder, and a check of each kind of damaged one. A check gives what came out, or asserts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._prefix = str(folder / "pair")
        draw = random.Random(1)
        with IndexedWriter(self._prefix, "<u2") as writer:
            for sequences in (1, 2, 1, 3, 1):
                for _ in range(sequences):
                    writer.add_sequence([draw.randrange(65_536) for _ in range(draw.randrange(7))])
                writer.end_document()
        pair = IndexedReader(self._prefix)
        source = {"file": "a", "bytes": 1, "sha256": "", "documents": 5, "lines": 9, "bad_lines": 1}
        write_provenance(
            self._prefix,
            Provenance("t", "ab", 300, ["<x>"], 2, True, "text", "uint16", 5, pair.num_tokens,
                       [{**source, "lines_without_document": "2-3,5"}], {}, {"bin": [], "idx": None}),
        )  # fmt: skip
        self._whole = {end: Path(self._prefix + end).read_bytes() for end in (".bin", ".idx", ".json")}
        rows = [
            {"text": draw.choice(("", "a\\n", "µg 日本", "x" * 30, "\U0001f600 \x00")), "n": [n, None]}
            for n in range(12)
        ]
        self._lines = (
            b"\n".join(json.dumps(row, ensure_ascii=n % 2 == 0).encode() for n, row in enumerate(rows)) + b"\n"
        )
        self._packed: dict[str, bytes] = {
            "gzip": gzip.compress(self._lines, mtime=0) + gzip.compress(b"{}\n", mtime=0),
            "bzip2": bz2.compress(self._lines) + bz2.compress(b"{}\n"),
            "xz": lzma.compress(self._lines) + lzma.compress(b"{}\n"),
        }
        try:
            import zstandard

            packer = zstandard.ZstdCompressor(write_checksum=True)
            self._packed["zstandard"] = packer.compress(self._lines) + packer.compress(b"{}\n")
        except ImportError as error:
            print(f"left out: {error}", file=sys.stderr)
        try:
            import pyarrow
            import pyarrow.parquet

            buffer = io.BytesIO()
            table = pyarrow.table({"text": [row["text"] for row in rows], "n": [row["n"][0] for row in rows]})
            pyarrow.parquet.write_table(table, buffer, row_group_size=5, write_page_checksum=True)
            self._parquet: bytes | None = buffer.getvalue()
        except ImportError:
            self._parquet = None

    def checks(self) -> dict[str, Callable[[random.Random], str]]:
        """The kinds of damage by name."""
        kinds: dict[str, Callable[[random.Random], str]] = {
            "index": lambda draw: self._pair(draw, ".idx"),
            "tokens": lambda draw: self._pair(draw, ".bin"),
            "provenance": self._provenance,
            "lines": self._json_lines,
        }
        for kind in self._packed:
            kinds[kind] = lambda draw, kind=kind: self._archive(draw, kind)  # type: ignore[misc]
        return kinds | ({"parquet": self._columns} if self._parquet else {})

    def _pair(self, draw: random.Random, end: str) -> str:
        files = {**self._whole, end: mutate(self._whole[end], draw)}
        for suffix in (".bin", ".idx"):
            Path(self._prefix + suffix).write_bytes(files[suffix])
        try:
            pair = IndexedReader(self._prefix)
            found = [pair.read(number).tolist() for number in range(len(pair))]
        except MegatronError:
            return "error"
        sizes, starts, documents = _reference(files[".idx"])
        width = pair.dtype.itemsize
        assert found == [
            np.frombuffer(files[".bin"][at : at + size * width], pair.dtype).tolist()
            for size, at in zip(sizes, starts, strict=True)
        ]
        assert sum(sizes) * width == len(files[".bin"])
        assert pair.document_index.tolist() == (
            documents if len(documents) != 1 or not sizes else [*range(len(sizes) + 1)]
        )
        return "read"

    def _provenance(self, draw: random.Random) -> str:
        for suffix in (".bin", ".idx"):
            Path(self._prefix + suffix).write_bytes(self._whole[suffix])
        Path(self._prefix + ".json").write_bytes(mutate(self._whole[".json"], draw))
        try:
            provenance = read_provenance(self._prefix)
            assert provenance is not None
            check_checksums(self._prefix, provenance)
            for document in range(min(9, provenance.documents)):
                file, line = source_line(provenance, document)
                assert isinstance(file, str) and isinstance(line, int)
        except MegatronError:
            return "error"
        return "read"

    def _texts(self, path: Path, draw: random.Random) -> tuple[list[str], int, int]:
        """(texts, bad lines, lines) of a file, cut somehow."""
        (source,) = find_sources([path])
        texts, bad, lines = [], 0, 0
        for chunk, position in read_chunks(
            source, ["text"], start_of(source), lambda _: None, draw.choice((1, 7, 100, 9999))
        ):
            parsed = parse_chunk(chunk, ["text"])
            texts += parsed.texts[0]
            bad += len(parsed.bad)
            lines += parsed.num_lines
            assert position.lines == lines
        return texts, bad, lines

    def _json_lines(self, draw: random.Random) -> str:
        content = mutate(self._lines, draw)
        (path := self._folder / "a.jsonl").write_bytes(content)
        try:
            found, bad, lines = self._texts(path, draw)
        except MegatronError:
            return "error"
        expected, expected_bad = _reference_texts(content.removeprefix(b"\xef\xbb\xbf"))
        assert (found, bad) == (expected, expected_bad), content
        assert lines == content.count(b"\n") + (not content.endswith(b"\n") and content != b"")
        with_fast, jsonl._LOADS = jsonl._LOADS, None  # the standard parser says the same
        try:
            assert self._texts(path, draw)[:2] == (found, bad)
        finally:
            jsonl._LOADS = with_fast
        return "read with bad lines" if bad else "read"

    def _archive(self, draw: random.Random, kind: str) -> str:
        content = mutate(self._packed[kind], draw)
        (path := self._folder / "a.packed").write_bytes(content)
        try:
            found, bad, _ = self._texts(path, draw)
        except MegatronError:
            return "error"
        if find_sources([path])[0].kind == "plain":  # its first bytes are gone
            assert bad or not content.strip()
            return "read with bad lines"
        members = (_reference_texts(self._lines)[0], [])
        assert found in (members[0], members[0] * 2, []), (kind, content)
        return "read"

    def _columns(self, draw: random.Random) -> str:
        assert self._parquet is not None
        content = mutate(self._parquet, draw)
        (path := self._folder / "a.parquet").write_bytes(content)
        try:
            found, bad, _ = self._texts(path, draw)
        except MegatronError:
            return "error"
        return "read with bad lines" if bad else f"read{'' if found else ' nothing'}"


def _reference(index: bytes) -> tuple[list[int], list[int], list[int]]:
    """(sizes, offsets, document index) as the format's description has them."""
    count, entries = struct.unpack_from("<QQ", index, 18)
    sizes = list(struct.unpack_from(f"<{count}i", index, 34))
    starts = list(struct.unpack_from(f"<{count}q", index, 34 + 4 * count))
    return sizes, starts, list(struct.unpack_from(f"<{entries}q", index, 34 + 12 * count))


def _reference_texts(content: bytes) -> tuple[list[str], int]:
    """(texts, number of bad lines) by Python's parser and the rules."""
    texts, bad = [], 0
    for line in content.split(b"\n"):
        if not line.strip(b" \t\r\x0b\x0c"):
            continue
        try:
            text = json.loads(line.decode("utf-8"), parse_int=float)["text"]
            if not isinstance(text, str):
                raise TypeError
            text.encode("utf-8")
            texts.append(text)
        except (ValueError, TypeError, KeyError, RecursionError):
            bad += 1
    return texts, bad


def fuzz(folder: Path, inputs: int, seed: int) -> collections.Counter[str]:
    """Try so many damaged inputs, all kinds in turn; how often what came out."""
    fuzzer = Fuzzer(folder)
    outcomes: collections.Counter[str] = collections.Counter()
    checks = list(fuzzer.checks().items())
    for number in range(inputs):
        kind, check = checks[number % len(checks)]
        try:
            outcomes[f"{kind}: {check(random.Random(f'{seed}/{number}'))}"] += 1
        except BaseException as error:
            raise AssertionError(f"input {number} of seed {seed} ({kind})") from error
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = fuzz(Path(folder), arguments.inputs, arguments.seed)
    for outcome, count in sorted(outcomes.items()):
        print(f"{outcome:<32}{count:>8}")
    print(f"{sum(outcomes.values()):,} inputs in {time.monotonic() - start_s:.0f} s: none was read wrongly")


if __name__ == "__main__":
    main()
