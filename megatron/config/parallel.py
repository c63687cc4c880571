"""The `parallel` section: how the processes share the model and the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.key import key

ScheduleName = Literal["1f1b", "interleaved", "zero_bubble", "gpipe"]
# How the layers are dealt out, or how many each part of the pipeline holds.
LayerSplit = Literal["even", "balanced"] | tuple[int, ...]
ContextAttention = Literal["ring", "all_gather"]


@dataclass(frozen=True)
class ParallelConfig:
    """The grid. The data-parallel size is what is left: world size / (tensor x context x pipeline)."""

    tensor: int = key(1, "Ranks that share every layer (keep it inside one machine).", minimum=1)
    context: int = key(
        1,
        "Ranks that share every sequence (context parallelism): each holds an early and a late part of it.",
        minimum=1,
    )
    context_attention: ContextAttention = key(
        "ring",
        "How keys and values reach the other ranks of the sequence: `ring`, passed on behind the computation; "
        "`all_gather`, collected at once: fewer messages, for as much memory as the keys and values of the whole "
        "sequence.",
    )
    pipeline: int = key(1, "Stages that the layers are divided into.", minimum=1)
    schedule: ScheduleName = key(
        "1f1b",
        "Order of the pipeline's work: `1f1b`; `interleaved`, which is 1F1B over several chunks of each stage; "
        "`zero_bubble` (ZB-H1): weight gradients fill the gaps, for as much memory on every stage as 1f1b needs on the "
        "first; `gpipe`: all forward passes first, for comparisons.",
    )
    chunks: int = key(
        1,
        "Parts of the model that each stage holds under `interleaved` (virtual stages): the pipeline's idle time is "
        "divided by it, messages are multiplied.",
        minimum=1,
    )
    layers: LayerSplit = key(
        "even",
        "Layers of each part of the pipeline: `even`; `balanced`, which counts the output product too; or a list with "
        "a number for each part in the order of the layers (pipeline x chunks of them).",
    )
    sequence: bool | None = key(
        None,
        "Sequence parallelism: split activations along the sequence between tensor-parallel layers. "
        "null: on when tensor > 1.",
    )
    zero: int | None = key(
        None,
        "0: optimizer state on every data rank; 1 (ZeRO-1): divided among the data ranks (and those of the context); "
        "3 (full sharding): weights and gradients too, which are gathered for one layer at a time. "
        "null: 1 when data x context is above 1.",
        minimum=0,
        maximum=3,
    )
    zero_within: int | None = key(
        None,
        "Divide only among this many neighbouring data x context ranks, such as those of one machine, and keep copies "
        "on the others: less traffic between machines for more memory. null: among all.",
        minimum=1,
    )
    timeout_s: int = key(1800, "Seconds after which a collective operation that does not end is an error.", minimum=1)
