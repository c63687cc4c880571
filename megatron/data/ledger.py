"""How much of each source a run has read, as a function of its position alone: nothing is counted while training."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.data.blend import Blend
from megatron.data.dataset import Dataset
from megatron.data.pretraining import StoredDataset


@dataclass(frozen=True)
class Account:
    """What was read of a source: `samples`, the `tokens` that they predict, and in how many `epochs`: 1.0 when every
    token of it was predicted once."""

    prefix: str
    samples: int
    tokens: int
    epochs: float


def ledger(dataset: Dataset, position: int) -> list[Account]:
    """What the first `position` samples of a dataset were read from; nothing for random tokens."""
    if isinstance(dataset, Blend):
        return [
            account
            for part, given in zip(dataset.parts, dataset.given(position), strict=True)
            for account in ledger(part, given)
        ]
    if not isinstance(dataset, StoredDataset):
        return []
    tokens = position * dataset.sequence_length
    return [Account(dataset.stream.prefix, position, tokens, position / dataset.samples_per_epoch)]
