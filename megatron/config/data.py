"""The `data` section: what is read, in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.key import key

# (weight, prefix) pairs; weights are None throughout where they follow from the sizes of the pairs.
Blend = tuple[tuple[float | None, str], ...]


@dataclass(frozen=True)
class BlendFrom:
    """The blend that is read from so many tokens of the run on."""

    from_tokens: int
    blend: Blend


# A prefix of a .bin/.idx pair (or, for training, "synthetic"), a blend, or blends one after the other.
Source = str | Blend | tuple[BlendFrom, ...]

SYNTHETIC = "synthetic"


def blends_of(source: Source) -> tuple[BlendFrom, ...]:
    """The blends of a source one after the other, the first from the beginning; a prefix is a blend of one."""
    if isinstance(source, str):
        return (BlendFrom(0, ((1.0, source),)),)
    stages = tuple(entry for entry in source if isinstance(entry, BlendFrom))
    return stages or (BlendFrom(0, tuple(entry for entry in source if not isinstance(entry, BlendFrom))),)


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and which sample is the n-th."""

    train: Source | None = key(
        None,
        "Training data: the prefix of a .bin/.idx pair; a list of [weight, prefix]; a list of prefixes, weighed by "
        "size; blends that follow each other, as [{from_tokens: 0, blend: [...]}, {from_tokens: 1e9, blend: [...]}]; "
        "or `synthetic` (seeded random tokens, for speed tests).",
    )
    validation: Source | None = key(
        None,
        "Validation data: a prefix, a list of [weight, prefix], or a list of prefixes, of which as much is read each. "
        "The loss of each is reported.",
    )
    test: Source | None = key(
        None,
        "Test data, as data.validation: its loss is reported once, at the end of training, on evaluate.batches.",
    )
    split: str | None = key(
        None,
        "Megatron's split string, as `969,30,1`: of each pair of data.train, in file order (of conversations in the "
        "random order of Megatron-LLM), the parts for training, for validation (then data.validation is left out) and "
        "for a test. null: all is for training.",
    )
    split_rounding: Literal["megatron-llm", "megatron-core"] = key(
        "megatron-llm",
        "Where the parts of data.split end: Megatron-LLM and Megatron Core round differently, by a sequence or two.",
    )
    temperature: float = key(
        1.0,
        "Weights of a list of prefixes in data.train are their tokens to the power of 1/temperature: 1 reads all alike "
        "often, more favours the small ones.",
        above=0,
    )
    kind: Literal["pretraining", "instruction"] = key(
        "pretraining",
        "`instruction`: prefixes are of conversations (PREFIX-text and PREFIX-role, as `megatron preprocess --chat` "
        "and Megatron-LLM write them), a sample is one of them or a row of several, and the loss is on the answers.",
    )
    packing: bool = key(
        False,
        "Pack several conversations into each sample, which do not see each other. false: each is a sample, and "
        "micro-batches are as long as their longest.",
    )
    prompt_loss_weight: float = key(
        0.0, "Weight of the loss of what is not an answer (of an answer it is 1).", minimum=0
    )
    pad_token_id: int | None = key(
        None,
        "A token that conversations never teach to say. Megatron-LLM takes its padding token for that: with its "
        "--no_new_tokens the end of sentence.",
        minimum=0,
    )
    sequence_length: int | None = key(
        None, "Tokens per sample that carry a prediction. null: the model's max_position_embeddings.", minimum=1
    )
    order: Literal["megatron", "stable"] = key(
        "megatron",
        "Order of the samples: `megatron` is exactly that of Megatron's GPT dataset, or of Megatron-LLM's instruction "
        "dataset; `stable` is a keyed permutation that stays the same when the run is extended.",
    )
    document_mask: bool = key(
        False,
        "Keep attention within the documents that a sample is packed of, and count positions from the beginning of "
        "each, in training and validation. Documents are those of the .idx file.",
    )
    seed: int = key(1234, "Seed of the order of the samples.", minimum=0, maximum=2**32 - 1)
    samples: int | None = key(
        None,
        "Number of samples the order is made for (the `megatron` order depends on it). null: what train.steps read.",
        minimum=1,
    )
    readahead: int = key(
        4,
        "Steps whose samples the system is told to fetch before they are read: for a file system that is slow to "
        "answer. 0: none.",
        minimum=0,
    )
