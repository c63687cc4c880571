"""`megatron merge`: several `.bin/.idx` pairs, one after the other, as one.

Tokens are copied by the kernel where the file system lets it, never read; the index is written anew. The `.json` files
are merged too, so that a document of the result can still be traced to its line. This module must not know what the
tokens mean.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.data.indexed import IndexedReader, IndexedWriter, clean_prefix, pair_paths, require_pair
from megatron.data.instruction.pair import holds_roles
from megatron.data.provenance import Provenance, provenance_path, read_provenance, write_provenance
from megatron.utils.errors import ConfigError, DataError, ResourceError
from megatron.utils.files import ensure_writable_folder, sha256_file
from megatron.utils.logging import get_logger

_LOGGER = get_logger(__name__)
# What the ids of two pairs have in common if they can be one: (what it is called, how to get it).
_SHARED = {
    "tokenizer": lambda made: (made.tokenizer_fingerprint, made.vocabulary_size),
    "end of document": lambda made: (made.append_eod, made.eod_id if made.append_eod else None),
    "beginning of sentence": lambda made: made.options.get("prepend_bos", False),
    "treatment of special tokens": lambda made: made.options.get("special_tokens", "text"),
}


def merge(inputs: Sequence[str | Path], output_prefix: str) -> str:
    """Write the pairs that the inputs name, in order, as one pair; its prefix.

    Raises DataError for pairs that are damaged or do not go together, ConfigError or ResourceError for an output that
    cannot be written; what was there before is then left.
    """
    prefixes = find_pairs(inputs)
    prefix = clean_prefix(output_prefix)
    bin_path = pair_paths(prefix)[0]
    if not Path(prefix).name or str(prefix).endswith("/"):
        raise ConfigError(
            f"--output-prefix {output_prefix!r} is not the name of a pair; give one, as in {Path(prefix) / 'corpus'}"
        )
    if any(pair_paths(other)[0].resolve() == bin_path.resolve() for other in prefixes):
        raise ConfigError(f"{prefix} is one of the pairs to merge; choose another --output-prefix or folder")
    pairs = [IndexedReader(other) for other in prefixes[:1]]
    provenances = [read_provenance(other) for other in prefixes]
    _check_they_agree(prefixes, provenances)
    _check_shards(prefixes, provenances)
    _tell_keys(provenances)
    ensure_writable_folder(bin_path.parent, "--output-prefix")
    try:
        with IndexedWriter(prefix, pairs[0].dtype) as writer:
            for other in prefixes:
                pair = IndexedReader(other)
                if pair.dtype != writer.dtype:
                    raise DataError(
                        f"{other} holds {pair.dtype.name}, but {prefixes[0]} {writer.dtype.name}: their vocabularies "
                        "differ; tokenize one of them again"
                    )
                writer.add_pair(pair)
            provenance_path(prefix).unlink(missing_ok=True)  # it may describe the pair that is about to go
        _describe(writer, prefixes, provenances)
    except OSError as error:
        raise ResourceError(
            f"writing {prefix}.* failed: {error.strerror or error}; nothing was kept; free some space or "
            "choose another folder"
        ) from error
    _LOGGER.info(
        "wrote %s.{bin,idx}: %s documents, %s tokens of %s pairs",
        prefix, f"{writer.num_documents:,}", f"{writer.num_tokens:,}", f"{len(prefixes):,}",
    )  # fmt: skip
    return prefix


def find_pairs(inputs: Sequence[str | Path]) -> list[str]:
    """The prefixes that the inputs name: pairs, folders of them, or patterns, the last two sorted by name.

    Raises DataError for what is not there or lacks one of its two files.
    """
    if "" in inputs:
        raise DataError("--input: one of the names is empty; give prefixes, folders or patterns of pairs")
    found: list[str] = []
    for each in map(str, inputs):
        if Path(each).is_dir():
            names = {path.stem for path in Path(each).iterdir() if path.suffix in (".bin", ".idx") and path.is_file()}
            matches = [str(Path(each) / name) for name in sorted(names)]
        elif glob.has_magic(each) and not pair_paths(each)[1].exists():
            paths = glob.glob(each, recursive=True) + glob.glob(f"{each}.idx", recursive=True)
            matches = sorted({clean_prefix(path) for path in paths if path.endswith((".bin", ".idx"))})
        else:
            matches = [clean_prefix(each)]
        if not matches:
            raise DataError(
                f"--input {each}: there are no .bin/.idx pairs; give prefixes, a folder or a pattern of them"
            )
        found += matches
    for prefix in found:
        require_pair(prefix)
    return found


def _check_they_agree(prefixes: Sequence[str], provenances: Sequence[Provenance | None]) -> None:
    roles = [prefix for prefix in prefixes if holds_roles(prefix)]
    if 0 < len(roles) < len(prefixes):
        raise DataError(
            f"{roles[0]} holds roles of conversations, and others tokens; merge those of each kind by themselves, by "
            "patterns such as 'P.shard-*-text.idx' and 'P.shard-*-role.idx'"
        )
    known = [(prefix, made) for prefix, made in zip(prefixes, provenances, strict=True) if made is not None]
    for what, of in _SHARED.items():
        for prefix, made in known[1:]:
            if of(made) != of(known[0][1]):
                raise DataError(
                    f"{prefix} and {known[0][0]} were made with another {what} ({of(made)} and {of(known[0][1])}): "
                    "their ids do not go together; tokenize one of them again"
                )


def _check_shards(prefixes: Sequence[str], provenances: Sequence[Provenance | None]) -> None:
    """Refuse shards of which some are missing, or that are not in order."""
    expected: tuple[int, int, str] | None = None  # (index, count, JSON key) of the shard that must come next
    for prefix, made in zip([*prefixes, ""], [*provenances, None], strict=True):
        shard = None if made is None else made.options.get("shard")
        index, count = (0, 0) if shard is None else map(int, shard.split("/"))
        key = "" if made is None else made.json_key
        if expected is not None and (index, count, key) != expected:
            wanted, of, wanted_key = expected
            raise DataError(
                f"shard {wanted}/{of} of the texts under {wanted_key!r} is missing"
                + (f" where {prefix} comes (shard {shard} of {key!r})" if prefix else " at the end")
                + "; give all shards of one key, in order: a pattern such as 'P.shard-*_KEY_document.idx' does"
            )
        if expected is None and shard is not None and index:
            raise DataError(f"{prefix} is shard {shard}, but shard 0/{count} is missing before it")
        expected = (index + 1, count, key) if shard is not None and index + 1 < count else None


def _tell_keys(provenances: Sequence[Provenance | None]) -> None:
    keys = dict.fromkeys(made.json_key for made in provenances if made is not None)
    if len(keys) > 1:
        _LOGGER.warning(
            "the pairs are of texts under different keys (%s), whose documents will follow each other; for a pair of "
            "each key merge these by themselves, by patterns such as '*_KEY_document.idx'",
            ", ".join(map(repr, keys)),
        )


def _describe(writer: IndexedWriter, prefixes: Sequence[str], provenances: Sequence[Provenance | None]) -> None:
    """Write the result's `.json`, if each pair has one."""
    known = [made for made in provenances if made is not None]
    if len(known) < len(provenances):
        lacking = [prefix for prefix, made in zip(prefixes, provenances, strict=True) if made is None]
        _LOGGER.warning("%s has no .json, so the result has none: which tokenizer made it is not known", lacking[0])
        return
    idx = sha256_file(writer.idx_path)
    write_provenance(
        writer.prefix,
        replace(
            known[0],
            json_key=", ".join(dict.fromkeys(made.json_key for made in known)),
            documents=writer.num_documents,
            tokens=writer.num_tokens,
            sources=_join_sources([source for made in known for source in made.sources]),
            options={name: value for name, value in known[0].options.items() if name != "shard"},
            checksums={"bin": [part for made in known for part in _bin_checksums(made, writer)], "idx": idx},
        ),
    )


def _bin_checksums(made: Provenance, writer: IndexedWriter) -> list[dict[str, Any]]:
    unknown = [{"bytes": made.tokens * writer.dtype.itemsize, "sha256": None}]
    return list(made.checksums.get("bin", unknown))


def _join_sources(sources: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sources, those that are a later part of a file knowing how many lines come before."""
    joined: list[dict[str, Any]] = []
    for source in sources:
        if source.get("begin") and "lines_before" not in source:
            before = joined[-1]
            assert before["file"] == source["file"], (before["file"], source["file"])
            source = {**source, "lines_before": before.get("lines_before", 0) + before["lines"]}
        joined.append(source)
    return joined
