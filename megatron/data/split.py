"""Megatron's split string: which sequences of a pair are for training, for validation and for a test."""

from __future__ import annotations

import math
import re
from typing import Literal

from megatron.utils.errors import ConfigError

Rounding = Literal["megatron-llm", "megatron-core"]


def split_bounds(split: str, sequences: int, rounding: Rounding) -> tuple[int, int, int, int]:
    """Bounds b0 = 0 … b3 of the three parts of so many sequences in file order: part k is b_k … b_{k+1} − 1.

    The two Megatrons differ by a sequence or two: Megatron-LLM adds rounded shares up, Megatron Core rounds the sums.
    Both round halves to even. Raises ConfigError for a text that is no split.
    """
    shares = _shares(split, rounding)
    if rounding == "megatron-core":
        sums, total = [0], 0.0
        for share in shares:
            total += share
            sums.append(round(total * sequences))
        return (sums[0], sums[1], sums[2], sums[3])
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share * sequences))
    surplus = bounds[3] - sequences
    return (0, max(0, bounds[1] - surplus), max(0, bounds[2] - surplus), sequences)


def _shares(split: str, rounding: Rounding) -> list[float]:
    """Three shares that sum to one."""
    if rounding == "megatron-core":
        words = re.findall(r"[.0-9]+", split)
    else:
        words = split.split("," if "," in split else "/")
    try:
        parts = [float(word) for word in words]
    except ValueError:
        parts = []
    if rounding == "megatron-llm":
        parts = parts[:3]  # it takes no notice of more
    if not 1 <= len(parts) <= 3 or not all(math.isfinite(part) and part >= 0 for part in parts) or not sum(parts) > 0:
        raise ConfigError(
            f"data.split={split!r} is not a split: write up to three numbers, as 969,30,1, the shares of training, "
            "validation and test"
        )
    parts += [0.0] * (3 - len(parts))
    return [part / sum(parts) for part in parts]
