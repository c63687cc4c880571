"""Pairs to one pair: bytes as Megatron-LLM's rule has them, shards as if there had been none, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.indexed import IndexedReader, IndexedWriter
from megatron.data.merge import find_pairs, merge
from megatron.data.preprocess import PreprocessOptions, preprocess
from megatron.data.preprocess.inputs import parse_shard
from megatron.data.preprocess.quarantine import parse_budget
from megatron.data.provenance import Provenance, check_checksums, read_provenance, source_line, write_provenance
from megatron.utils.errors import ConfigError, DataError, ResourceError

from .conftest import MakePair
from .killing import make_inputs


def write(prefix: Path, documents: list[list[list[int]]]) -> str:
    with IndexedWriter(prefix, "<u2") as writer:
        for document in documents:
            for sequence in document:
                writer.add_sequence(sequence)
            writer.end_document()
    return str(prefix)


_DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 65_535), max_size=4), min_size=1, max_size=3), max_size=5)


@given(pairs=st.lists(_DOCUMENTS, min_size=1, max_size=5), in_kernel=st.booleans())
@settings(max_examples=50)
def test_a_merged_pair_is_that_of_all_documents(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[list[list[list[int]]]], in_kernel: bool
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    prefixes = [write(folder / f"part{number}", documents) for number, documents in enumerate(pairs)]
    write(folder / "expected", [document for documents in pairs for document in documents])
    with pytest.MonkeyPatch.context() as patch:
        if not in_kernel:
            patch.setattr(os, "copy_file_range", not_here)
        merge(prefixes, str(folder / "merged"))
    for suffix in (".bin", ".idx"):
        assert (folder / f"merged{suffix}").read_bytes() == (folder / f"expected{suffix}").read_bytes()


def not_here(*_: object) -> int:
    raise OSError(errno.EXDEV, "another file system")


def test_real_pairs_by_the_rule_of_megatron_llm(shared: Path, tmp_path: Path) -> None:
    prefix = str(shared / "data/megatron/meg-gpt2-openwebtext_text_document")
    pair = IndexedReader(prefix)
    merged = IndexedReader(merge([prefix, prefix], str(tmp_path / "twice")))
    assert merged.sizes.tolist() == pair.sizes.tolist() * 2
    documents = pair.document_index.tolist()
    assert merged.document_index.tolist() == documents + [len(pair) + start for start in documents[1:]]
    assert (tmp_path / "twice.bin").read_bytes() == Path(prefix + ".bin").read_bytes() * 2


def test_folders_and_patterns_are_sorted_as_strings(make_pair: MakePair, tmp_path: Path) -> None:
    prefixes = [make_pair([[number]], name=f"part{number}") for number in (10, 9, 2)]
    (tmp_path / "part9.json.old").touch()
    assert find_pairs([tmp_path]) == [str(tmp_path / name) for name in ("part10", "part2", "part9")]
    assert find_pairs([str(tmp_path / "part[29]*")]) == [str(tmp_path / name) for name in ("part2", "part9")]
    assert find_pairs([prefixes[2] + ".bin", prefixes[0]]) == [prefixes[2], prefixes[0]]
    (tmp_path / "part2.idx").unlink()
    with pytest.raises(DataError, match=r"part2.idx is missing"):
        find_pairs([tmp_path])
    for nothing in (tmp_path / "no*", shared_nothing(tmp_path)):
        with pytest.raises(DataError, match=r"there are no \.bin/\.idx pairs"):
            find_pairs([nothing])


def shared_nothing(folder: Path) -> Path:
    (folder / "nothing").mkdir()
    return folder / "nothing"


def test_a_thousand_pairs_are_merged_with_few_files_open(
    make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # only for speed
    (tmp_path / "many").mkdir()
    for number in range(1000):
        make_pair([[number], [number, number]], name=f"many/part{number:04d}")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
    try:
        merged = IndexedReader(merge([tmp_path / "many"], str(tmp_path / "all")))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (len(merged), merged.num_tokens) == (2000, 3000)
    assert merged.read_stream(0, 3000).tolist() == np.repeat(np.arange(1000), 3).tolist()


@pytest.fixture
def options(tmp_path: Path, tiny_tokenizer: Path) -> PreprocessOptions:
    inputs = make_inputs(tmp_path, 400)
    return PreprocessOptions(
        tuple(inputs), str(tmp_path / "out/p"), tiny_tokenizer, json_keys=("q", "a"), append_eod=True,
        max_bad_lines=parse_budget("100%"),
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_merged_shards_are_the_pair_without_shards(options: PreprocessOptions, tmp_path: Path, count: int) -> None:
    preprocess(options)
    for index in range(count):
        preprocess(replace(options, shard=parse_shard(f"{index}/{count}"), output_prefix=str(tmp_path / "parts/p")))
    for key in options.json_keys:
        whole = f"{options.output_prefix}_{key}_document"
        merged = merge([str(tmp_path / f"parts/p.shard-*_{key}_document.idx")], str(tmp_path / f"merged_{key}"))
        for suffix in (".bin", ".idx"):
            assert Path(merged + suffix).read_bytes() == Path(whole + suffix).read_bytes()
        one, other = read_provenance(whole), read_provenance(merged)
        assert one is not None and other is not None
        assert check_checksums(merged, other) == sum(Path(merged + end).stat().st_size for end in (".bin", ".idx"))
        for document in range(one.documents):
            assert source_line(other, document) == source_line(one, document)
        assert (one.documents, one.tokens, one.tokenizer_fingerprint) == (
            other.documents, other.tokens, other.tokenizer_fingerprint,
        )  # fmt: skip


def test_shards_that_are_missing_or_mixed_are_refused(options: PreprocessOptions, tmp_path: Path) -> None:
    corpus = tmp_path / "even.jsonl"
    corpus.write_text('{"q": "pain", "a": "rest"}\n' * 30)
    options = replace(options, inputs=(corpus,))
    for index in range(3):
        preprocess(replace(options, shard=parse_shard(f"{index}/3")))
    parts = [f"{options.output_prefix}.shard-0000{index}-of-00003_q_document" for index in range(3)]
    for wrong, said in (
        ([parts[0], parts[2]], r"shard 1/3 of the texts under 'q' is missing where .*shard-00002"),
        (parts[:2], r"shard 2/3 of the texts under 'q' is missing at the end"),
        (parts[1:], r"is shard 1/3, but shard 0/3 is missing"),
        ([str(tmp_path / "out")], r"shard 1/3 of the texts under 'a' is missing"),
    ):
        with pytest.raises(DataError, match=said):
            merge(wrong, str(tmp_path / "merged"))
    assert not list(tmp_path.glob("merged*"))
    with pytest.raises(DataError, match="merge the shards first"):
        source_line(read_provenance(parts[1]), 0)  # type: ignore[arg-type]
    merge(parts * 2, str(tmp_path / "twice"))


def test_pairs_of_several_keys_are_merged_key_by_key_or_one_after_the_other(
    options: PreprocessOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = tmp_path / "titled.jsonl"
    rows = [("one", "rest"), ("", "pain and fever"), ("three", ""), ("four", "no sign of harm")] * 5
    corpus.write_text("".join(json.dumps({"title": title, "text": text}) + "\n" for title, text in rows))
    options = replace(options, inputs=(corpus,), json_keys=("title", "text"))
    preprocess(options)
    for index in range(2):
        preprocess(replace(options, shard=parse_shard(f"{index}/2"), output_prefix=str(tmp_path / "parts/p")))
    with pytest.raises(DataError, match=r"shard 1/2 of the texts under 'text' is missing where .*0000-of.*title"):
        merge([tmp_path / "parts"], str(tmp_path / "mixed"))
    titles, texts = (
        merge([f"{tmp_path}/parts/*_{key}_document.idx"], str(tmp_path / key)) for key in ("title", "text")
    )
    for key, merged in (("title", titles), ("text", texts)):
        assert Path(merged + ".bin").read_bytes() == Path(f"{options.output_prefix}_{key}_document.bin").read_bytes()
    caplog.clear()
    both = merge([titles, texts], str(tmp_path / "both"))
    assert "texts under different keys ('title', 'text')" in caplog.text
    provenance, pair = read_provenance(both), IndexedReader(both)
    assert provenance is not None and (provenance.json_key, provenance.documents) == ("title, text", 30)
    assert [pair.read(number).tolist() for number in range(30)] == [
        IndexedReader(one).read(number).tolist() for one in (titles, texts) for number in range(15)
    ]
    expected = [line for column in (0, 1) for line, row in enumerate(rows, start=1) if row[column]]
    assert [source_line(provenance, document)[1] for document in range(30)] == expected


def made(prefix: str, **changes: object) -> None:
    pair = IndexedReader(prefix)
    first = Provenance(
        "t.model", "ab", 300, [], 2, True, "text", pair.dtype.name, pair.num_documents, pair.num_tokens, []
    )
    write_provenance(prefix, replace(first, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer_fingerprint": "cd"}, r"another tokenizer \(\('cd', 300\) and \('ab', 300\)\)"),
        ({"append_eod": False}, "another end of document"),
        ({"options": {"prepend_bos": True}}, "another beginning of sentence"),
    ],
)
def test_pairs_whose_ids_differ_are_refused(
    make_pair: MakePair, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    one, other = make_pair([[1]], name="one"), make_pair([[2]], name="other")
    made(one)
    made(other, **change)
    with pytest.raises(DataError, match=said):
        merge([one, other], str(tmp_path / "merged"))
    assert not list(tmp_path.glob("merged*"))


def test_of_pairs_made_elsewhere_nothing_is_claimed(make_pair: MakePair, tmp_path: Path) -> None:
    one, other = make_pair([[1]], name="one"), make_pair([[2]], name="other")
    made(one)
    (tmp_path / "merged.json").write_text("of an earlier pair")
    merge([one, other], str(tmp_path / "merged"))
    assert not (tmp_path / "merged.json").exists()
    made(other)
    merge([one, other], str(tmp_path / "merged"))
    parts = json.loads((tmp_path / "merged.json").read_text())["checksums"]["bin"]
    assert parts == [{"bytes": 2, "sha256": None}] * 2


def test_what_cannot_be_one_pair_is_refused_and_leaves_what_was_there(
    make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = make_pair([[1]], name="one"), make_pair([[2]], name="other", dtype="<i4")
    merged = make_pair([[9]], name="merged")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError, match=r"other holds int32, but .*one uint16"):
        merge([one, other], merged)
    with pytest.raises(ConfigError, match="is one of the pairs to merge"):
        merge([merged, one], merged)
    for no_name in (f"{tmp_path}/", "", "."):
        with pytest.raises(ConfigError, match="is not the name of a pair"):
            merge([one], no_name)
    with pytest.raises(DataError, match="one of the names is empty"):
        merge([one, ""], merged)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(ResourceError, match="No space left on device; nothing was kept"):
        merge([one, one], merged)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert IndexedReader(merged).read(0).tolist() == [9]


def test_tokens_and_roles_of_conversations_do_not_get_into_one_pair(make_pair: MakePair, tmp_path: Path) -> None:
    folder = tmp_path / "talks"
    folder.mkdir()
    names = [f"talks/{shard}-{kind}" for shard in "ab" for kind in ("text", "role")]
    prefixes = [make_pair([[2, 1]], name=name) for name in names]
    for mixed in ([str(folder)], prefixes[:2], [prefixes[0], prefixes[3]]):
        with pytest.raises(DataError, match=r"[ab]-role holds roles"):
            merge(mixed, str(tmp_path / "all"))
    for kind in ("text", "role"):
        merge([f"{folder}/*-{kind}.idx"], str(tmp_path / f"all-{kind}"))
        assert len(IndexedReader(tmp_path / f"all-{kind}")) == 2
    plain = make_pair([[3]], name="cast-role")  # a name like this is no pair of roles by itself
    merge([plain, prefixes[0]], str(tmp_path / "plain"))


def test_a_changed_byte_is_found(options: PreprocessOptions) -> None:
    preprocess(options)
    prefix = f"{options.output_prefix}_q_document"
    provenance = read_provenance(prefix)
    assert provenance is not None
    for suffix, said in ((".bin", "are not those that were written"), (".idx", "is not what was written")):
        content = Path(prefix + suffix).read_bytes()
        Path(prefix + suffix).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataError, match=said):
            check_checksums(prefix, provenance)
        Path(prefix + suffix).write_bytes(content)
