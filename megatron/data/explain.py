"""Where the tokens of a sample come from: which documents, which of their tokens, which lines of which files."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.data.blend import Blend
from megatron.data.dataset import Dataset
from megatron.data.pretraining import StableOrderDataset, StoredDataset
from megatron.data.provenance import Provenance, read_provenance, source_line
from megatron.data.stream import Excerpt
from megatron.utils.errors import DataError


@dataclass(frozen=True)
class Origin:
    """What a sample of the order is: number `number` of the samples of `prefix`, in epoch `epoch` (from 0; None where
    epochs are mixed), made of `excerpts`, each with the file and line of its document where that is known."""

    prefix: str
    number: int
    epoch: int | None
    excerpts: tuple[tuple[Excerpt, tuple[str, int] | None], ...]


def origin_of(dataset: Dataset, index: int) -> Origin | None:
    """Where sample `index` of a dataset comes from; None where it is not made of stored documents."""
    if isinstance(dataset, Blend):
        member, number = dataset.locate_one(index)
        return origin_of(member, number)
    if not isinstance(dataset, StoredDataset):
        return None
    prefix = dataset.stream.prefix
    epoch = index // dataset.windows_per_epoch if isinstance(dataset, StableOrderDataset) else None
    provenance = read_provenance(prefix)
    excerpts = tuple((excerpt, line_of(provenance, excerpt.document)) for excerpt in dataset.excerpts(index))
    return Origin(prefix, index, epoch, excerpts)


def line_of(provenance: Provenance | None, document: int) -> tuple[str, int] | None:
    """The file and the line (from 1) that a document of a pair was made of, where its .json says so."""
    if provenance is None:
        return None
    try:
        return source_line(provenance, document)
    except DataError:  # written by an earlier version, or a shard
        return None
