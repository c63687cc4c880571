"""`PREFIX.json`, which `megatron preprocess` writes beside a pair: which tokenizer made it, and from which texts.

The pair itself is Megatron's format and says nothing of that, so pairs made elsewhere have no such file.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron.data.indexed import clean_prefix, pair_paths
from megatron.utils.errors import DataError
from megatron.utils.files import sha256_file, write_atomically


@dataclass(frozen=True)
class Provenance:
    """How a pair was made.

    `tokenizer` is the file's name, for people; `tokenizer_fingerprint` says which token each id is. `added_tokens` were
    appended after the tokenizer's own. `eod_id` ends documents if `append_eod`. `options` are the other choices that
    the ids depend on.

    `sources` are the inputs in order, each with `file`, `bytes` and `sha256` (of what was read), `documents`, `lines`,
    `bad_lines` and `lines_without_document` (blank, bad or of a text without tokens: `3-7,12`, counted from 1). A part
    of a file, which a shard read, has `begin` (the byte or row where it starts) and, once merged, `lines_before`.
    `checksums` are `idx`, the SHA-256 of the index, and `bin`, those of the tokens: a list of `bytes` and `sha256`,
    one for each pair that was merged. Files of earlier versions lack some of these.
    """

    tokenizer: str
    tokenizer_fingerprint: str
    vocabulary_size: int
    added_tokens: list[str]
    eod_id: int | None
    append_eod: bool
    json_key: str
    dtype: str
    documents: int
    tokens: int
    sources: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    checksums: dict[str, Any] = field(default_factory=dict)


def provenance_path(prefix: str | Path) -> Path:
    """Where a pair's `.json` is."""
    return Path(f"{clean_prefix(prefix)}.json")


def provenance_text(provenance: Provenance) -> str:
    """What `PREFIX.json` holds, in UTF-8 with a name of a file that is not escaped as Python writes it."""
    text = json.dumps(asdict(provenance), indent=2, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


def write_provenance(prefix: str | Path, provenance: Provenance) -> None:
    """Write `PREFIX.json`, whole or not at all."""
    write_atomically(provenance_path(prefix), provenance_text(provenance))


def read_provenance(prefix: str | Path) -> Provenance | None:
    """What `PREFIX.json` says, None where there is none.

    Raises DataError if it is damaged, or describes another pair than the one it lies beside.
    """
    path = provenance_path(prefix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = [each for each in fields(Provenance) if each.name in content or _is_required(each)]
        provenance = Provenance(**{each.name: content[each.name] for each in known})
        _check_types(provenance)
        described_bytes = provenance.tokens * np.dtype(provenance.dtype).itemsize
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not what `megatron preprocess` writes ({type(error).__name__}: {error}); "
            "tokenize again, or delete it to go without the tokenizer check"
        ) from error
    bin_path = pair_paths(prefix)[0]
    if bin_path.is_file() and bin_path.stat().st_size != described_bytes:
        raise DataError(
            f"{path} describes {described_bytes:,} bytes of tokens, but {bin_path.name} has "
            f"{bin_path.stat().st_size:,}: it belongs to another pair; delete it or tokenize again"
        )
    return provenance


def _is_required(each: Any) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


_TYPES: dict[str, type | tuple[type, ...]] = {
    "tokenizer": str, "tokenizer_fingerprint": str, "vocabulary_size": int, "added_tokens": list,
    "eod_id": (int, type(None)), "append_eod": bool, "json_key": str, "dtype": str, "documents": int, "tokens": int,
    "sources": list, "options": dict, "checksums": dict,
}  # fmt: skip
_SOURCE_TYPES = {
    "file": str, "bytes": int, "sha256": str, "documents": int, "lines": int, "bad_lines": int,
    "lines_without_document": str, "begin": int, "lines_before": int,
}  # fmt: skip
_SOURCE_NEEDS = ("file", "bytes", "sha256", "documents")


def _check_types(provenance: Provenance) -> None:
    """Raise TypeError or KeyError for values that are not what the class says."""
    for name, kind in _TYPES.items():
        _check_type(name, getattr(provenance, name), kind)
    for token in provenance.added_tokens:
        _check_type("added_tokens", token, str)
    for source in provenance.sources:
        _check_type("sources", source, dict)
        for name in {*_SOURCE_NEEDS, *(_SOURCE_TYPES.keys() & source.keys())}:
            _check_type(f"sources: {name}", source[name], _SOURCE_TYPES[name])
    parts = provenance.checksums.get("bin", [])
    _check_type("checksums: bin", parts, list)
    for part in parts:
        _check_type("checksums: bytes", part["bytes"], int)
        _check_type("checksums: sha256", part["sha256"], (str, type(None)))
    _check_type("checksums: idx", provenance.checksums.get("idx"), (str, type(None)))


def _check_type(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    if not isinstance(value, kind) or (kind is int and not 0 <= value < 2**63):  # type: ignore[operator]
        raise TypeError(f"{name} is {str(value)[:80]!r}")


def source_line(provenance: Provenance, document_index: int) -> tuple[str, int]:
    """The file and the line (from 1; the row, of a parquet file) that a document was made of.

    Raises DataError where the file of an earlier version, or of a shard that was not merged, does not say.
    """
    if not 0 <= document_index < provenance.documents:
        raise DataError(f"there is no document {document_index}: the pair has {provenance.documents:,}, from 0")
    left = document_index
    for source in provenance.sources:
        if left < source["documents"]:
            return source["file"], _line_of(source, left)
        left -= source["documents"]
    raise DataError("the sources have fewer documents than the pair: its .json was changed; tokenize again")


def _line_of(source: dict[str, Any], document: int) -> int:
    """The line of a source that gave its n-th document, from 0."""
    if "lines_without_document" not in source:
        raise DataError(f"the .json does not say which lines of {source['file']} gave documents; tokenize again")
    if source.get("begin") and "lines_before" not in source:
        raise DataError(f"{source['file']} was read from byte or row {source['begin']:,} on; merge the shards first")
    # Behind k ranges, line = document + 1 + their lengths; the right k is the last whose range begins before it.
    firsts, lengths = _ranges(source["lines_without_document"])
    skipped = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    documents_before = firsts - 1 - skipped[:-1]
    behind = bisect_left(documents_before, document + 1) if len(firsts) else 0
    return int(document + 1 + skipped[behind] + source.get("lines_before", 0))


def _ranges(text: str) -> tuple[np.ndarray, np.ndarray]:
    """First lines and lengths of `3-7,12`. Raises DataError for anything else."""
    pairs = [part.partition("-")[::2] for part in text.split(",") if part]
    try:
        firsts = np.array([int(low) for low, _ in pairs], dtype=np.int64)
        lasts = np.array([int(high or low) for low, high in pairs], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError(f"the .json has lines that are no numbers ({error}): it was changed; tokenize again") from error
    if len(firsts) and not (firsts[0] > 0 and (lasts >= firsts).all() and (firsts[1:] > lasts[:-1]).all()):
        raise DataError("the .json has lines that are not in order: it was changed; tokenize again")
    return firsts, lasts - firsts + 1


def check_checksums(prefix: str | Path, provenance: Provenance) -> int:
    """Read a pair and compare it with the checksums of its `.json`; how many bytes that has shown to be right.

    Raises DataError for a difference. What an earlier version wrote has no checksums: 0.
    """
    bin_path, idx_path = pair_paths(prefix)
    checked = 0
    try:
        with open(bin_path, "rb") as file:
            for part in provenance.checksums.get("bin", []):
                begin, digest = file.tell(), _digest(file, part["bytes"])
                if part["sha256"] is not None and digest != part["sha256"]:
                    raise DataError(
                        f"{bin_path}: bytes {begin:,} to {begin + part['bytes']:,} are not those that were written "
                        "(their SHA-256 differs); copy or make it again"
                    )
                checked += 0 if part["sha256"] is None else part["bytes"]
        if idx := provenance.checksums.get("idx"):
            if sha256_file(idx_path) != idx:
                raise DataError(f"{idx_path} is not what was written (its SHA-256 differs); copy or make it again")
            checked += idx_path.stat().st_size
    except OSError as error:
        raise DataError(f"{bin_path} and .idx cannot be read: {error.strerror or error}") from error
    return checked


def _digest(file: BinaryIO, num_bytes: int) -> str:
    digest = hashlib.sha256()
    while num_bytes and (block := file.read(min(num_bytes, 1 << 20))):
        digest.update(block)
        num_bytes -= len(block)
    return digest.hexdigest()
