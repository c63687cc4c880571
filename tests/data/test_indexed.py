"""The `.bin/.idx` format: exact bytes, real files, every kind of damage, and no half pairs."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.indexed import IndexedReader, IndexedWriter, dtype_for_vocabulary, reader, writer
from megatron.utils.errors import DataError

DTYPE_CODES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}


def write_raw(prefix: Path, code: int = 8, version: int = 1, **arrays: list[int]) -> Path:
    """A pair written by hand from the description of the format."""
    sizes, pointers, documents = arrays["sizes"], arrays["pointers"], arrays["documents"]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", version, code, len(sizes), len(documents))
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(pointers)}q", *pointers)
    prefix.with_suffix(".idx").write_bytes(index + struct.pack(f"<{len(documents)}q", *documents))
    prefix.with_suffix(".bin").write_bytes(struct.pack("<6H", 10, 11, 12, 13, 14, 15))
    return prefix


def _work_in_pieces(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    for module in (reader, writer):
        monkeypatch.setattr(module, "CHUNK", chunk)


GOOD = {"sizes": [3, 0, 1, 2], "pointers": [0, 6, 6, 8], "documents": [0, 2, 4]}


def test_a_pair_written_by_hand_is_read_and_written_identically(tmp_path: Path) -> None:
    prefix = write_raw(tmp_path / "hand", **GOOD)
    reader = IndexedReader(prefix)
    assert [reader.read(i).tolist() for i in range(len(reader))] == [[10, 11, 12], [], [13], [14, 15]]
    assert reader.read(0, 1).tolist() == [11, 12]
    assert reader.read(0, 1, 1).tolist() == [11]
    assert reader.read_stream(2, 5).tolist() == [12, 13, 14]
    assert reader.sizes.tolist() == GOOD["sizes"] and reader.sizes.dtype == np.int32
    assert reader.pointers.tolist() == GOOD["pointers"] and reader.pointers.dtype == np.int64
    assert reader.document_index.tolist() == GOOD["documents"]
    assert (reader.dtype, reader.num_tokens, reader.num_documents) == (np.dtype("<u2"), 6, 2)
    with IndexedWriter(tmp_path / "again", "<u2") as writer:
        for first, last in ((0, 2), (2, 4)):
            for sequence in range(first, last):
                writer.add_sequence(reader.read(sequence))
            writer.end_document()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"again{suffix}").read_bytes() == prefix.with_suffix(suffix).read_bytes()


@pytest.mark.parametrize(
    ("name", "dtype", "documents", "tokens"),
    [
        ("meg-gpt2-openwebtext_text_document", "<u2", 1_000, 1_361_845),
        ("ag_news_prompt_inputs_document", "<i4", 100, 5_945),
    ],
)
def test_real_pairs_are_read_and_rewritten_byte_for_byte(
    shared: Path, tmp_path: Path, name: str, dtype: str, documents: int, tokens: int
) -> None:
    source = shared / "data/megatron" / name
    reader = IndexedReader(source)
    assert (reader.dtype, reader.num_documents, reader.num_tokens) == (np.dtype(dtype), documents, tokens)
    with IndexedWriter(tmp_path / name, reader.dtype) as writer:
        for first, last in zip(reader.document_index[:-1], reader.document_index[1:], strict=True):
            for sequence in range(first, last):
                writer.add_sequence(reader.read(sequence).tolist())
            writer.end_document()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"{name}{suffix}").read_bytes() == Path(f"{source}{suffix}").read_bytes()


def test_every_document_of_the_real_pair_ends_in_its_end_of_document(shared: Path) -> None:
    reader = IndexedReader(shared / "data/megatron/meg-gpt2-openwebtext_text_document.idx")
    assert all(reader.read(i)[-1] == 4999 for i in range(len(reader)))


@given(data=st.data(), code=st.sampled_from(sorted(DTYPE_CODES)), chunk=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, code: int, chunk: int
) -> None:
    dtype = np.dtype(DTYPE_CODES[code])
    limits = np.iinfo(dtype)
    sequence = st.lists(st.integers(int(limits.min), int(limits.max)), max_size=5)
    documents = data.draw(st.lists(st.lists(sequence, max_size=3), max_size=6))
    prefix = tmp_path_factory.mktemp("pair") / "a.b"
    with pytest.MonkeyPatch.context() as patch:
        _work_in_pieces(patch, chunk)  # so that the index is written and checked in several pieces
        with IndexedWriter(prefix, dtype) as writer:
            for document in documents:
                for tokens in document:
                    writer.add_sequence(tokens)
                writer.end_document()
        reader = IndexedReader(prefix)
    flat = [tokens for document in documents for tokens in document]
    assert [reader.read(i).tolist() for i in range(len(reader))] == flat
    assert reader.document_index.tolist() == [0, *np.cumsum([len(document) for document in documents])]
    assert reader.read_stream(0, reader.num_tokens).tolist() == [token for tokens in flat for token in tokens]
    index = (prefix.parent / "a.b.idx").read_bytes()
    assert index[:18] == b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, code)
    assert len(index) == 34 + 12 * len(flat) + 8 * (len(documents) + 1)


def test_many_documents_at_once_are_as_one_by_one(tmp_path: Path) -> None:
    documents = [[1, 2], [3], [4, 5, 6]]
    with IndexedWriter(tmp_path / "one", "<u2") as one, IndexedWriter(tmp_path / "many", "<u2") as many:
        for document in documents:
            one.add_sequence(document)
            one.end_document()
        many.add_documents(np.arange(1, 4, dtype="<u2"), [2, 1])
        many.add_documents(np.arange(4, 7, dtype="<u2"), [3])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"many{suffix}").read_bytes()


def test_dtype_is_chosen_by_vocabulary_as_megatron_does() -> None:
    assert [dtype_for_vocabulary(size).str for size in (512, 32_019, 65_499, 65_500, 128_256)] == [
        "<u2",
        "<u2",
        "<u2",
        "<i4",
        "<i4",
    ]


def test_a_lone_zero_as_document_index_means_a_document_per_sequence(tmp_path: Path) -> None:
    reader = IndexedReader(write_raw(tmp_path / "p", **{**GOOD, "documents": [0]}))
    assert reader.document_index.tolist() == [0, 1, 2, 3, 4]
    assert reader.num_documents == 4


def test_modes_after_the_document_index_are_passed_over(tmp_path: Path) -> None:
    prefix = write_raw(tmp_path / "p", **GOOD)
    with open(prefix.with_suffix(".idx"), "ab") as file:
        file.write(bytes(4))
    assert IndexedReader(prefix).document_index.tolist() == [0, 2, 4]


def test_an_empty_pair_is_legal(tmp_path: Path) -> None:
    IndexedWriter(tmp_path / "empty", "<i4").close()
    reader = IndexedReader(tmp_path / "empty")
    assert (len(reader), reader.num_documents, reader.num_tokens) == (0, 0, 0)
    assert reader.read_stream(0, 0).tolist() == []


def test_prefixes_may_carry_a_suffix_and_dots(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "v1.5.corpus", "<u2") as writer:
        writer.add_sequence([1, 2])
        writer.end_document()
    for name in ("v1.5.corpus", "v1.5.corpus.bin", "v1.5.corpus.idx"):
        assert IndexedReader(tmp_path / name).num_tokens == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"code": 6}, ["dtype code 6", "floating-point"]),
        ({"code": 7}, ["dtype code 7", "floating-point"]),
        ({"code": 9}, ["unknown dtype code 9"]),
        ({"version": 2}, ["version 2"]),
        ({"sizes": [3, 0, -1, 4]}, ["sequence 2", "negative length -1"]),
        ({"sizes": [3, 0, 1, 3]}, ["12 bytes", "describes 14", "truncated"]),
        ({"sizes": [3, 0, 1, 1]}, ["12 bytes", "describes 10", "too long"]),
        ({"pointers": [0, 6, 4, 8]}, ["sequence 2", "byte 4", "byte 6"]),
        ({"pointers": [2, 6, 6, 8]}, ["sequence 0", "byte 2"]),
        ({"documents": []}, ["document index", "nothing"]),
        ({"documents": [1, 4]}, ["begins with 1"]),
        ({"documents": [0, 2, 3]}, ["ends with 3", "4"]),
        ({"documents": [0, 3, 2, 4]}, ["falls from 3 to 2", "entry 2"]),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
def test_damage_is_named(
    tmp_path: Path, change: dict[str, object], said: list[str], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _work_in_pieces(monkeypatch, chunk)  # entries checked at a time: damage may lie where two of them meet
    prefix = write_raw(tmp_path / "bad", **{**GOOD, **change})
    with pytest.raises(DataError) as error:
        IndexedReader(prefix)
    for words in [str(tmp_path / "bad"), *said]:
        assert words in str(error.value)


def test_the_old_dialect_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "old.idx").write_bytes(b"TNTIDX\x00\x00" + struct.pack("<QQQ", 1, 4, 4))
    (tmp_path / "old.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"TNTIDX.*megatron preprocess"):
        IndexedReader(tmp_path / "old")


def test_every_truncation_of_either_file_is_noticed(tmp_path: Path) -> None:
    prefix = write_raw(tmp_path / "cut", **GOOD)
    for suffix in (".idx", ".bin"):
        path = prefix.with_suffix(suffix)
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(DataError, match=r"trunc|not a token index"):
                IndexedReader(prefix)
        path.write_bytes(whole)
    assert IndexedReader(prefix).num_tokens == 6


def test_no_changed_byte_before_the_document_index_goes_unnoticed(tmp_path: Path) -> None:
    prefix = write_raw(tmp_path / "flip", **GOOD)
    path = prefix.with_suffix(".idx")
    whole = path.read_bytes()
    generator = random.Random(5)
    for at in range(34 + 12 * len(GOOD["sizes"])):
        for value in generator.sample(range(256), 8):
            if value == whole[at] or (at == 17 and value == 3):  # i16 is as wide as u16
                continue
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            with pytest.raises(DataError):
                IndexedReader(prefix)


def test_missing_files_are_named_with_what_is_there_instead(tmp_path: Path) -> None:
    write_raw(tmp_path / "pubmed_text_document", **GOOD)
    with pytest.raises(DataError, match=r"no token data at .*pubmed.*there are: pubmed_text_document"):
        IndexedReader(tmp_path / "pubmed")
    (tmp_path / "pubmed_text_document.bin").unlink()
    with pytest.raises(DataError, match=r"pubmed_text_document.bin is missing"):
        IndexedReader(tmp_path / "pubmed_text_document")
    with pytest.raises(DataError, match="no token data"):
        IndexedReader(tmp_path / "nowhere" / "pubmed")


@pytest.mark.parametrize(("dtype", "token"), [("<u2", 65_536), ("<u2", -1), ("<i4", 2**31), ("u1", 256)])
def test_a_token_that_does_not_fit_is_refused_not_wrapped(tmp_path: Path, dtype: str, token: int) -> None:
    with (
        pytest.raises(DataError, match=f"token {token} does not fit"),
        IndexedWriter(tmp_path / "p", dtype) as writer,
    ):
        writer.add_sequence([1, token])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_pair(tmp_path: Path) -> None:
    prefix = write_raw(tmp_path / "p", **GOOD)
    with pytest.raises(RuntimeError), IndexedWriter(prefix, "<u2") as writer:
        writer.add_sequence([7])
        raise RuntimeError("stop")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.bin", "p.idx"]
    assert IndexedReader(prefix).num_tokens == 6


def test_nothing_bears_the_final_names_before_close(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "p", "<u2")
    writer.add_sequence([7])
    writer.end_document()
    assert not (tmp_path / "p.bin").exists() and not (tmp_path / "p.idx").exists()
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.bin", "p.idx"]


@pytest.mark.parametrize("killed_at", [1, 2])
def test_killed_between_the_renames_no_old_index_lies_beside_new_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    prefix = write_raw(tmp_path / "p", **GOOD)
    writer = IndexedWriter(prefix, "<u2")
    writer.add_sequence([7])
    writer.end_document()
    renames, rename = [], Path.replace

    def replace(self: Path, target: Path) -> Path:
        renames.append(target)
        if len(renames) == killed_at:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    with pytest.raises(DataError, match=r"p.idx is missing"):
        IndexedReader(prefix)


class HugeTokens:
    """Stands for more tokens than a test wants to write; the file is made that long afterwards."""

    dtype = np.dtype("<u2")
    size = 3 * 2**29

    def tobytes(self) -> bytes:
        return b""


def test_offsets_past_4_gib_do_not_overflow(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "huge", "<u2")
    for _ in range(2):
        writer.add_documents(HugeTokens(), [HugeTokens.size])  # type: ignore[arg-type]
    partial = writer.partial_bin
    os.truncate(partial, 2 * 2 * HugeTokens.size)  # a hole: takes no space
    with open(partial, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", 4242))
    writer.close()
    reader = IndexedReader(tmp_path / "huge")
    assert reader.pointers.tolist() == [0, 2 * HugeTokens.size]
    assert reader.read(1, HugeTokens.size - 1).tolist() == [4242]
