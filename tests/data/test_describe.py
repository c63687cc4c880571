"""What `megatron inspect` says of a pair."""

from __future__ import annotations

import pytest

from megatron.data.describe import describe_indexed
from megatron.data.provenance import Provenance, write_provenance
from megatron.utils.errors import DataError

from .conftest import MakePair


def test_a_pair_made_elsewhere(make_pair: MakePair) -> None:
    prefix = make_pair([range(10), range(20), range(3), []])
    rows = dict(describe_indexed(prefix + ".idx"))
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
    rows = dict(describe_indexed(prefix))
    assert rows["tokenizer"] == f"tokenizer.model, fingerprint {'ab' * 32}"
    assert rows["vocabulary"] == "32,002 tokens, of which added: 2 (<a> <b>)"
    assert rows["end of document"] == "id 2, ends every document"
    assert (rows["JSON key"], rows["sources"]) == ("text", "x.jsonl (2.0 KiB)")


def test_an_empty_pair_and_a_missing_one(make_pair: MakePair) -> None:
    assert dict(describe_indexed(make_pair([])))["tokens"] == "0 (0)"
    with pytest.raises(DataError, match="no token data"):
        describe_indexed(make_pair([]) + "-missing")
