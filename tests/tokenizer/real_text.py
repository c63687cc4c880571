"""The real text of ../shared/data: medical questions and answers, guidelines, articles, records, reviews, speeches."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

_ARCHIVES = ("medquad_ccby4.tar.gz", "guidelines/nstg2022.tar.gz")
_PATTERNS = ("jats/*", "pubmed/*", "questions/*", "questions/mmlu_medical/*", "replay/public_domain/*")
_CHARACTERS = 4_000_000


def real_texts(data: Path, every: int = 1) -> Iterator[str]:
    """One in `every` of the texts, of all their kinds, long ones cut to as small a part."""
    for content in _contents(data, every):
        yield content.decode("utf-8", errors="replace")[: _CHARACTERS // every]


def _contents(data: Path, every: int) -> Iterator[bytes]:
    for archive in _ARCHIVES:
        with tarfile.open(data / archive) as files:
            for member in [member for member in files if member.isfile()][::every]:
                content = files.extractfile(member)
                assert content is not None
                yield content.read()
    with zipfile.ZipFile(data / "replay/movie_reviews.zip") as reviews:
        yield from (reviews.read(name) for name in reviews.namelist()[::every])
    for pattern in _PATTERNS:
        files_of_kind = [path for path in sorted(data.glob(pattern)) if path.is_file()]
        yield from (path.read_bytes() for path in files_of_kind[:: max(1, every // 10)])
