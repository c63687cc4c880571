"""Whether the files of an opened model are what they were, by what checksums are known of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megatron.checkpoint.native import MANIFEST, find_damaged
from megatron.checkpoint.source import Source
from megatron.checkpoint.torch_file import SUFFIXES, is_damaged
from megatron.utils.errors import CheckpointError
from megatron.utils.files import sha256_file
from megatron.utils.hub import known_sha256


def compare_checksums(source: Source, names: Iterable[str] | None = None) -> Iterator[tuple[str, bool]]:
    """Read files (default: all) and yield the name of each that a checksum is known of, and whether it is damaged.

    Known are those in `checkpoint.json`, those after which the cache of the hub names its files, and those within the
    archives of pickles.
    """
    if source.manifest is not None:
        yield from find_damaged(source.folder, source.manifest, names)
        return
    for name in source.weight_files if names is None else names:
        path = source.folder / name
        expected = known_sha256(path)
        if expected is not None:
            yield name, sha256_file(path) != expected
        elif path.suffix in SUFFIXES:
            yield name, is_damaged(path)


def damage(source: Source, names: Sequence[str]) -> CheckpointError:
    """The error that says which files are damaged, and the cure."""
    where, cure = "within it", "Use another copy"
    if source.manifest is not None:
        where = f"in {MANIFEST}"
    elif known_sha256(source.folder / names[0]) is not None:
        where = "after which the hub's cache names it"
        cure = f"Delete {(source.folder / names[0]).resolve()} and fetch the model again"
    files = ", ".join(str(source.folder / name) for name in names)
    return CheckpointError(f"{files} is damaged: its checksum is not the one {where}. {cure}.")
