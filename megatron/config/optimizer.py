"""The `optimizer` section: AdamW and its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.key import key


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. Step k (from 1) uses the schedule at n = k - 1, so the first warm-up step has rate 0, as in Megatron."""

    learning_rate: float = key(3e-4, "Peak learning rate, reached after warm-up.", minimum=0.0)
    min_learning_rate: float = key(0.0, "Learning rate at the end of the decay and after it.", minimum=0.0)
    warmup_steps: int = key(0, "Steps of linear warm-up from 0.", minimum=0)
    decay_steps: int | None = key(
        None,
        "Horizon of the schedule in steps, warm-up included; not the step at which the run stops. null: train.steps.",
        minimum=1,
    )
    decay_style: Literal["constant", "linear", "cosine", "inverse_square_root", "wsd"] = key(
        "cosine", "Shape of the schedule after warm-up; `wsd` is warm-up, stable, decay."
    )
    decay_fraction: float = key(
        0.1, "With `wsd`: the last part of decay_steps, during which the rate falls.", above=0.0, maximum=1.0
    )
    beta1: float = key(0.9, "AdamW's decay of the first moment.", minimum=0.0, below=1.0)
    beta2: float = key(0.95, "AdamW's decay of the second moment.", minimum=0.0, below=1.0)
    eps: float = key(1e-8, "AdamW's epsilon.", above=0.0)
    weight_decay: float = key(0.1, "Decoupled weight decay, applied to matrices only.", minimum=0.0)
    clip_grad: float = key(
        1.0, "Largest global gradient norm; larger gradients are scaled down to it. 0: off.", minimum=0.0
    )
