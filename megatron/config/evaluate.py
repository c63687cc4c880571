"""The `evaluate` section: validation while training."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.key import key


@dataclass(frozen=True)
class EvaluateConfig:
    """Validation on the first samples of data.validation in file order: the same set each time."""

    interval: int | None = key(None, "Steps between validations. null: never.", minimum=1)
    batches: int = key(10, "Global batches per validation.", minimum=1)
