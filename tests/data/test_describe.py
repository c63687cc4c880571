"""What `megatron inspect` says of a pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.__main__ import main
from megatron.data.describe import describe_indexed, histogram, table_of_pair, verify_pair
from megatron.data.indexed import IndexedReader
from megatron.data.provenance import Provenance, write_provenance
from megatron.utils.errors import DataError
from megatron.utils.files import sha256_file

from .conftest import MakePair


def test_a_pair_made_elsewhere(make_pair: MakePair) -> None:
    prefix = make_pair([range(10), range(20), range(3), []])
    rows = dict(table_of_pair(describe_indexed(prefix + ".idx")))
    assert rows["pair"] == prefix
    assert rows["dtype"] == "uint16"
    assert (rows["documents"], rows["sequences"]) == ("4", "4")
    assert rows["tokens"] == "33 (33)"
    assert rows["bytes"] == "66 B tokens, 122 B index"
    assert rows["sequence lengths"].startswith("shortest 0, 10 % 0, median 3, mean 8.2, 90 % 10, longest 20")
    assert rows["tokenizer"] == "unknown: there is no corpus_text_document.json"


def test_a_pair_of_ours_says_its_tokenizer_and_sources(make_pair: MakePair) -> None:
    prefix = make_pair([range(10)])
    write_provenance(
        prefix,
        Provenance("tokenizer.model", "ab" * 32, 32_002, ["<a>", "<b>"], 2, True, "text", "uint16", 1, 10,
                   [{"file": "x.jsonl", "bytes": 2048, "sha256": "00", "documents": 1}]),
    )  # fmt: skip
    rows = dict(table_of_pair(describe_indexed(prefix)))
    assert rows["tokenizer"] == f"tokenizer.model, fingerprint {'ab' * 32}"
    assert rows["vocabulary"] == "32,002 tokens, of which added: 2 (<a> <b>)"
    assert rows["end of document"] == "id 2, ends every document"
    assert (rows["JSON key"], rows["sources"]) == ("text", "x.jsonl (2.0 KiB)")


def test_machines_get_numbers(make_pair: MakePair, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = make_pair([range(10), range(20), range(3), []])
    assert main(["inspect", prefix, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "pair": prefix,
        "token_bytes": 66,
        "index_bytes": 122,
        "dtype": "uint16",
        "documents": 4,
        "sequences": 4,
        "tokens": 33,
        "sequence_lengths": {
            "shortest": 0,
            "percentile_10": 0,
            "median": 3,
            "mean": 8.25,
            "percentile_90": 10,
            "longest": 20,
        },
        "length_histogram": [
            {"from": 0, "to": 0, "sequences": 1, "tokens": 0},
            {"from": 2, "to": 3, "sequences": 1, "tokens": 3},
            {"from": 8, "to": 15, "sequences": 1, "tokens": 10},
            {"from": 16, "to": 31, "sequences": 1, "tokens": 20},
        ],
        "tokenizer": None,
    }


def test_the_histogram_has_every_sequence_once() -> None:
    sizes = np.array([0, 1, 1, 2, 3, 4, 7, 8, 2**20 - 1, 2**20, 2**31 - 1], dtype=np.int32)
    bins = histogram(sizes)
    for one in bins:
        inside = sizes[(sizes >= one["from"]) & (sizes <= one["to"])].astype(np.int64)
        assert (len(inside), int(inside.sum())) == (one["sequences"], one["tokens"])
    assert sum(one["sequences"] for one in bins) == len(sizes)
    assert sum(one["tokens"] for one in bins) == sizes.sum(dtype=np.int64)


def provenance(prefix: str, **changes: Any) -> Provenance:
    reader = IndexedReader(prefix)
    values = {"documents": reader.num_documents, "tokens": int(reader.num_tokens), "dtype": reader.dtype.name}
    made = Provenance("t.model", "ab" * 32, 40, [], None, False, "text", sources=[], **{**values, **changes})
    write_provenance(prefix, made)
    return made


def test_a_whole_pair_is_verified(make_pair: MakePair, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = make_pair([range(10), range(20), range(3), []])
    assert verify_pair(prefix) == "the structure of 4 sequences, 33 tokens, no checksums are known"
    digest, idx = sha256_file(Path(prefix + ".bin")), sha256_file(Path(prefix + ".idx"))
    provenance(prefix, checksums={"idx": idx, "bin": [{"bytes": 66, "sha256": digest}]})
    assert verify_pair(prefix) == (
        "the structure of 4 sequences, 33 tokens of a vocabulary of 40, the checksums of 188 B"
    )
    assert main(["inspect", prefix, "--verify"]) == 0
    assert "verified          the structure of 4 sequences" in capsys.readouterr().out
    assert main(["dataset", "verify", prefix]) == 0
    assert "right are the structure of 4 sequences" in capsys.readouterr().out


def test_what_is_damaged_is_found(make_pair: MakePair, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = make_pair([range(10), range(30), range(3)])
    digest = sha256_file(Path(prefix + ".bin"))
    provenance(prefix, checksums={"idx": None, "bin": [{"bytes": 86, "sha256": digest}]})
    verify_pair(prefix)
    content = bytearray(Path(prefix + ".bin").read_bytes())
    content[20] ^= 1
    Path(prefix + ".bin").write_bytes(content)
    with pytest.raises(DataError, match="SHA-256 differs"):
        verify_pair(prefix)
    content[21] = 200
    Path(prefix + ".bin").write_bytes(content)
    with pytest.raises(DataError, match=r"token 10 of the file is 51201, not among the vocabulary of 40"):
        verify_pair(prefix)
    provenance(prefix, documents=4)
    other = make_pair([[1, -2]], name="negative", dtype="<i4")
    assert main(["dataset", "verify", prefix, other]) == 2
    errors = capsys.readouterr().err
    assert "not among the vocabulary" in errors and "token 1 of the file is -2, negative" in errors
    Path(prefix + ".bin").write_bytes(b"\0" * 86)
    with pytest.raises(DataError, match=r"describes 4 documents and 43 tokens of uint16, but the pair has 3"):
        verify_pair(prefix)


def test_an_empty_pair_and_a_missing_one(make_pair: MakePair) -> None:
    empty = describe_indexed(make_pair([]))
    assert (empty["tokens"], empty["sequence_lengths"]) == (0, None)
    assert dict(table_of_pair(empty))["tokens"] == "0 (0)"
    with pytest.raises(DataError, match="no token data"):
        describe_indexed(make_pair([]) + "-missing")
