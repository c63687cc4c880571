"""Learning-rate schedules: pure functions of the number of finished steps."""

from __future__ import annotations

import math

from megatron.config.optimizer import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, decay_steps: int) -> float:
    """The rate that training step `step` (from 1) uses; `decay_steps` is the horizon, warm-up included.

    As in Megatron the schedule is read at n = step − 1, so the first step of a warm-up has rate 0; beyond the
    horizon the rate is the floor; only `constant` never decays.
    """
    n = step - 1
    peak, floor, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    if warmup > 0 and n <= warmup:
        return peak * n / warmup
    if config.decay_style == "constant":
        return peak
    if n > decay_steps:
        return floor
    if config.decay_style == "inverse_square_root":
        return max(floor, peak * math.sqrt(max(warmup, 1) / max(n, 1)))
    if config.decay_style == "wsd":
        return _warmup_stable_decay(config, n, decay_steps)
    done = (n - warmup) / (decay_steps - warmup)
    if config.decay_style == "linear":
        return floor + (1.0 - done) * (peak - floor)
    assert config.decay_style == "cosine", config.decay_style
    return floor + 0.5 * (1.0 + math.cos(math.pi * done)) * (peak - floor)


def _warmup_stable_decay(config: OptimizerConfig, n: int, decay_steps: int) -> float:
    """The peak until the last `decay_fraction` of the horizon, then a straight line to the floor (Hu et al., 2024)."""
    start = max(config.warmup_steps, decay_steps - max(1, round(config.decay_fraction * decay_steps)))
    if n <= start:
        return config.learning_rate
    left = (decay_steps - n) / (decay_steps - start)
    return config.min_learning_rate + left * (config.learning_rate - config.min_learning_rate)
