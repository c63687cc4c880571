"""The `train` section: how long, in which batches, in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.batches import GlobalBatch
from megatron.config.key import key

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class TrainConfig:
    """The training loop. Batches are counted in sequences."""

    steps: int = key(100, "Step at which the run ends, counted from the very first start.", minimum=1)
    exit_interval: int | None = key(
        None,
        "The run saves and ends for now, with exit code 0, after each step that is a multiple of this; the same "
        "command goes on.",
        minimum=1,
    )
    exit_minutes: float | None = key(
        None,
        "The same after the step in which the program has run for so many minutes, the time to start counted: less "
        "than a job's limit by a step and a save.",
        above=0.0,
    )
    global_batch: GlobalBatch = key(
        8,
        "Sequences per step over all ranks: a number, or for a ramp pairs of (from so many tokens on, number), as "
        "[[0, 256], [1e9, 512]].",
        minimum=1,
    )
    micro_batch: int = key(1, "Sequences that a rank computes at a time.", minimum=1)
    precision: Literal["bf16", "fp32", "fp64"] = key(
        "bf16", "Type of weights and activations; under `bf16` gradients, masters and moments are float32."
    )
    seed: int = key(1234, "Seed of random initial weights.", minimum=0, maximum=2**32 - 1)
    recompute: Recompute = key(
        "none",
        "What the backward pass computes again to save memory: `selective`: norms and the SwiGLU product, almost for "
        "free; `full`: whole layers, for about a third more time. The gradients are the same to the bit.",
    )
    recompute_layers: int | None = key(
        None, "How many layers of each pipeline stage `recompute` is for, the first ones. null: all.", minimum=1
    )
    gc_interval: int | None = key(
        100,
        "Steps between runs of Python's garbage collector, at the same steps on all ranks, so that none holds up the "
        "others. null: whenever Python likes.",
        minimum=1,
    )
    deterministic: bool = key(False, "Use only algorithms that give the same bits each time (slower on a GPU).")
