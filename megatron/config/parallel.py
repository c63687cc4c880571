"""The `parallel` section: how the processes share the model and the batch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.key import key


@dataclass(frozen=True)
class ParallelConfig:
    """The grid. The data-parallel size is what is left: world size / (tensor x pipeline)."""

    tensor: int = key(1, "Ranks that share every layer (keep it inside one machine).", minimum=1)
    pipeline: int = key(1, "Stages that the layers are divided into.", minimum=1)
    sequence: bool | None = key(
        None,
        "Sequence parallelism: split activations along the sequence between tensor-parallel layers. "
        "null: on when tensor > 1.",
    )
    zero: int | None = key(
        None,
        "0: optimizer state on every data rank; 1 (ZeRO-1): divided among the data ranks. "
        "null: 1 when the data-parallel size is above 1.",
        minimum=0,
        maximum=1,
    )
    timeout_s: int = key(1800, "Seconds after which a collective operation that does not end is an error.", minimum=1)
