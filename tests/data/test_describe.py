"""What `megatron inspect` says of a pair."""

from __future__ import annotations

import json

import pytest

from megatron.__main__ import main
from megatron.data.describe import describe_indexed, table_of_pair
from megatron.data.provenance import Provenance, write_provenance
from megatron.utils.errors import DataError

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
        "tokenizer": None,
    }


def test_an_empty_pair_and_a_missing_one(make_pair: MakePair) -> None:
    empty = describe_indexed(make_pair([]))
    assert (empty["tokens"], empty["sequence_lengths"]) == (0, None)
    assert dict(table_of_pair(empty))["tokens"] == "0 (0)"
    with pytest.raises(DataError, match="no token data"):
        describe_indexed(make_pair([]) + "-missing")
