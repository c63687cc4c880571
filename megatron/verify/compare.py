"""Puts the regions of all ranks together and measures how far they are from those of the one-rank model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron.parallel.layout import Region

# Deviations are relative to the largest element of their tensor; float64 sums in another order stay far below.
TOLERANCE = 1e-10

Regions = list[tuple[Region, NDArray[np.float64]]]


@dataclass
class RankResult:
    """What one rank saw: per step loss and gradient norm before clipping; the first step's gradients and the weights
    after the last step, as regions of canonical tensors; and which collectives it used, as (axis, kind)."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: Regions = field(default_factory=list)
    weights: Regions = field(default_factory=list)
    used: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Deviation:
    """How far one tensor or figure is from the one-rank model's."""

    what: str
    name: str
    value: float


def deviations(results: Sequence[RankResult], reference: RankResult) -> list[Deviation]:
    """Every loss, norm, gradient and weight, largest deviation first. What is not finite, or missing, is infinitely far
    off; so are figures or copies in which ranks differ."""
    found = []
    for what in ("losses", "norms"):
        expected = getattr(reference, what)
        for step, value in enumerate(expected, 1):
            seen = [getattr(result, what)[step - 1] for result in results]
            far = max(abs(other - value) / abs(value) if value else abs(other) for other in seen)
            far = far if len(set(seen)) == 1 else np.inf
            found.append(Deviation(what, f"step {step}", _finite(far)))
    for what in ("gradients", "weights"):
        expected = assemble(getattr(reference, what))
        ours = assemble(pair for result in results for pair in getattr(result, what))
        for name, tensor in expected.items():
            scale = float(np.abs(tensor).max())
            far = float(np.abs(ours[name] - tensor).max()) / (scale or 1.0) if name in ours else np.inf
            found.append(Deviation(what, name, _finite(far)))
    return sorted(found, key=lambda deviation: -deviation.value)


def assemble(regions: Iterable[tuple[Region, NDArray[np.float64]]]) -> dict[str, NDArray[np.float64]]:
    """Whole tensors from the regions of all ranks; NaN where none holds a part, or where copies differ."""
    whole: dict[str, NDArray[np.float64]] = {}
    seen: dict[str, NDArray[np.bool_]] = {}
    for region, values in regions:
        tensor = whole.setdefault(region.name, np.full(region.shape, np.nan))
        known = seen.setdefault(region.name, np.zeros(region.shape, dtype=np.bool_))
        place, before = tensor[region.slices], known[region.slices]
        place[...] = np.where(before & (place != values), np.nan, values)
        before[...] = True
    return whole


def _finite(far: float) -> float:
    return far if np.isfinite(far) else float("inf")
