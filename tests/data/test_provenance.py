"""Documents back to their lines, also from files of earlier versions, and what changed files say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.preprocess.gaps import GapFile
from megatron.data.provenance import Provenance, provenance_path, read_provenance, source_line, write_provenance
from megatron.utils.errors import DataError

from .conftest import MakePair

MADE = Provenance("t.model", "ab", 300, [], 2, True, "text", "uint16", 4, 4, [])


def source(file: str, documents: int, gaps: str = "", **more: Any) -> dict[str, Any]:
    return {"file": file, "bytes": 9, "sha256": "", "documents": documents, "lines_without_document": gaps, **more}


@given(gives=st.lists(st.lists(st.booleans(), max_size=30), min_size=1, max_size=4), cut=st.integers(1, 7))
def test_each_document_is_traced_to_its_line(
    tmp_path_factory: pytest.TempPathFactory, gives: list[list[bool]], cut: int
) -> None:
    import numpy as np

    gaps = GapFile(str(tmp_path_factory.mktemp("gaps") / "p"))
    expected = []
    for number, lines in enumerate(gives):
        for begin in range(0, len(lines), cut):  # as chunks come
            without = [begin + at + 1 for at, document in enumerate(lines[begin : begin + cut]) if not document]
            gaps.add(number, np.array(without, dtype=np.int64))
        expected += [(f"f{number}", line) for line, document in enumerate(lines, start=1) if document]
    ranges = gaps.ranges()
    gaps.close()
    sources = [source(f"f{number}", sum(lines), ranges.get(number, "")) for number, lines in enumerate(gives)]
    made = replace(MADE, documents=len(expected), sources=sources)
    assert [source_line(made, document) for document in range(len(expected))] == expected
    for beyond in (-1, len(expected)):
        with pytest.raises(DataError, match=f"there is no document {beyond}"):
            source_line(made, beyond)


def test_a_later_part_of_a_file_counts_from_the_files_beginning() -> None:
    made = replace(MADE, sources=[source("f", 2, "2", lines=3), source("f", 2, "1", begin=99, lines_before=3)])
    assert [source_line(made, document)[1] for document in range(4)] == [1, 3, 5, 6]


def test_files_of_earlier_versions_still_read(make_pair: MakePair) -> None:
    prefix = make_pair([[1], [2], [3], [4]])
    old = {name: value for name, value in vars(MADE).items() if name not in ("options", "checksums")}
    old["sources"] = [{"file": "x.jsonl", "bytes": 2048, "sha256": "00", "documents": 4}]
    provenance_path(prefix).write_text(json.dumps(old))
    provenance = read_provenance(prefix)
    assert provenance is not None and provenance.sources == old["sources"]
    with pytest.raises(DataError, match=r"does not say which lines of x.jsonl gave documents"):
        source_line(provenance, 0)


@pytest.mark.parametrize(
    "change",
    [{"tokens": "4"}, {"documents": -1}, {"sources": [{"file": "x"}]}, {"sources": [source("f", 1) | {"lines": "3"}]},
     {"added_tokens": [3]}, {"checksums": {"bin": [{"bytes": 3}]}}, {"dtype": "uint17"}, {"append_eod": 1}],
)  # fmt: skip
def test_a_changed_file_is_refused(make_pair: MakePair, change: dict[str, Any]) -> None:
    prefix = make_pair([[1], [2], [3], [4]])
    write_provenance(prefix, MADE)
    assert read_provenance(prefix) == MADE
    provenance_path(prefix).write_text(json.dumps({**vars(MADE), **change}))
    with pytest.raises(DataError, match="is not what `megatron preprocess` writes"):
        read_provenance(prefix)


@pytest.mark.parametrize("gaps", ["a", "3-2", "0", "5,4", "1-3,3", "1,,x"])
def test_lines_that_make_no_sense_are_refused(gaps: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the \.json has lines that are"):
        source_line(replace(MADE, sources=[source("f", 4, gaps)]), 0)
