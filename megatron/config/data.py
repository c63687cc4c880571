"""The `data` section: what is read, in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.key import key

# A prefix of a .bin/.idx pair (or, for training, "synthetic"), or a blend of (weight, prefix) pairs.
Source = str | tuple[tuple[float, str], ...]

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and which sample is the n-th."""

    train: Source | None = key(
        None,
        "Training data: the prefix of a .bin/.idx pair, a list of [weight, prefix], "
        "or `synthetic` (seeded random tokens, for speed tests).",
    )
    validation: Source | None = key(None, "Validation data, in the same forms as data.train.")
    sequence_length: int | None = key(
        None, "Tokens per sample that carry a prediction. null: the model's max_position_embeddings.", minimum=1
    )
    order: Literal["megatron", "stable"] = key(
        "megatron",
        "Order of the samples: `megatron` is exactly that of Megatron's GPT dataset; `stable` is a keyed permutation "
        "that stays the same when the run is extended.",
    )
    document_mask: bool = key(
        False,
        "Keep attention within the documents that a sample is packed of, and count positions from the beginning of "
        "each, in training and validation. Documents are those of the .idx file.",
    )
    seed: int = key(1234, "Seed of the order of the samples.", minimum=0, maximum=2**32 - 1)
    samples: int | None = key(
        None,
        "Number of samples the order is made for (the `megatron` order depends on it). "
        "null: train.steps x train.global_batch.",
        minimum=1,
    )
