"""`PREFIX.json`, which `megatron preprocess` writes beside a pair: which tokenizer made it, and from which texts.

The pair itself is Megatron's format and says nothing of that, so pairs made elsewhere have no such file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.indexed import clean_prefix, pair_paths
from megatron.utils.errors import DataError
from megatron.utils.files import write_atomically


@dataclass(frozen=True)
class Provenance:
    """How a pair was made.

    `tokenizer` is the file's name, for people; `tokenizer_fingerprint` says which token each id is. `added_tokens` were
    appended after the tokenizer's own. `eod_id` ends documents if `append_eod`. `sources` are the input files, each
    with `file`, `bytes`, `sha256`, `documents`.
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


def provenance_path(prefix: str | Path) -> Path:
    """Where a pair's `.json` is."""
    return Path(f"{clean_prefix(prefix)}.json")


def write_provenance(prefix: str | Path, provenance: Provenance) -> None:
    """Write `PREFIX.json`, whole or not at all."""
    write_atomically(provenance_path(prefix), json.dumps(asdict(provenance), indent=2, ensure_ascii=False) + "\n")


def read_provenance(prefix: str | Path) -> Provenance | None:
    """What `PREFIX.json` says, None where there is none.

    Raises DataError if it is damaged, or describes another pair than the one it lies beside.
    """
    path = provenance_path(prefix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        provenance = Provenance(**{field.name: content[field.name] for field in fields(Provenance)})
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
