"""The `evaluate` section: validation while training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.key import key

MetricName = Literal["perplexity", "accuracy", "instruct_accuracy", "count_loss_mask", "count_instruct_mask"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Validation on the first samples of data.validation in file order: the same set each time."""

    interval: int | None = key(None, "Steps between validations. null: never.", minimum=1)
    batches: int = key(10, "Global batches per validation.", minimum=1)
    metrics: tuple[MetricName, ...] = key(
        (),
        "What is reported beside the loss, as `[accuracy, count_loss_mask]`; those with `instruct` leave out the "
        "markup around messages.",
    )
