"""Comparing two models of any formats, tensor by tensor and in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from megatron.checkpoint.safetensors_file import DTYPE_NAMES
from megatron.checkpoint.source import Source
from megatron.model.config import ModelConfig
from megatron.parallel.layout import Region
from megatron.utils.errors import ConfigError

BLOCK_ELEMENTS = 2**20

Progress = Callable[[str, int, int], None]  # (what is compared, bytes so far, bytes in all)


@dataclass(frozen=True)
class TensorDifference:
    """How the values of one tensor differ; `relative` is the largest difference over the largest value of either."""

    kind: str
    name: str
    largest: float
    relative: float
    differing: int
    numel: int
    dtypes: tuple[str, str]


@dataclass
class Comparison:
    """All that was found. Missing tensors and other shapes as readable lines."""

    compared: int = 0
    missing: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))  # in the first, in the second
    shapes: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    values: list[TensorDifference] = field(default_factory=list)
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def is_different(self, tolerance: float | None = None) -> bool:
        """Whether anything counts: with a tolerance, other dtypes and smaller differences do not."""
        beyond = [one for one in self.values if tolerance is None or not one.largest <= tolerance]
        others = [*self.missing[0], *self.missing[1], *self.shapes, *self.config]
        return bool(beyond or others or (self.dtypes and tolerance is None))


def compare(first: Source, second: Source, progress: Progress = lambda what, done, total: None) -> Comparison:
    """Compare weights, what else both hold of the optimizer, and the configurations.

    Raises CheckpointError where a file cannot be read.
    """
    found = Comparison(config=_config_differences(first.model_config, second.model_config))
    kinds = [kind for kind in first.index if kind in second.index]
    for kind in sorted({*first.index, *second.index} - set(kinds)):
        holder = "the first" if kind in first.index else "the second"
        found.notes.append(f"only {holder} holds {kind}")
    common: list[tuple[str, str]] = []
    for kind in kinds:
        shapes = first.shapes(kind), second.shapes(kind)
        prefix = "" if kind == "weights" else f"{kind} of "
        for side in range(2):
            found.missing[side].extend(prefix + name for name in shapes[1 - side] if name not in shapes[side])
        for name in shapes[0]:
            if name not in shapes[1]:
                continue
            if shapes[0][name] != shapes[1][name]:
                found.shapes.append(f"{prefix}{name}: {list(shapes[0][name])} and {list(shapes[1][name])}")
                continue
            dtypes = _dtype_names(first, second, name, kind)
            if dtypes[0] != dtypes[1]:
                found.dtypes.append(f"{prefix}{name}: {dtypes[0]} and {dtypes[1]}")
            common.append((kind, name))
    total_bytes = sum(first.index[kind][name].size_bytes for kind, name in common)
    done_bytes = 0
    for kind, name in common:
        difference = _compare_tensor(first, second, name, kind)
        if difference is not None:
            found.values.append(difference)
        done_bytes += first.index[kind][name].size_bytes
        progress(name, done_bytes, total_bytes)
    found.compared = len(common)
    found.values.sort(key=lambda one: -one.largest if not math.isnan(one.largest) else -math.inf)
    return found


def _dtype_names(first: Source, second: Source, name: str, kind: str) -> tuple[str, str]:
    return DTYPE_NAMES[first.dtype(name, kind)], DTYPE_NAMES[second.dtype(name, kind)]


def _compare_tensor(first: Source, second: Source, name: str, kind: str) -> TensorDifference | None:
    """None where all values are equal; two that are no number are."""
    shape = first.shapes(kind)[name]
    dtypes = first.dtype(name, kind), second.dtype(name, kind)
    exact = all(dtype in (torch.bfloat16, torch.float16, torch.float32) for dtype in dtypes)
    common = torch.float32 if exact else torch.float64
    largest, scale, differing = 0.0, 0.0, 0
    for region in _blocks(name, shape):
        sides = [torch.empty(region.size, dtype=common) for _ in range(2)]
        for source, side in zip((first, second), sides, strict=True):
            source.read(region, side, kind)
        same = (sides[0] == sides[1]) | (sides[0].isnan() & sides[1].isnan())
        unequal = int((~same).sum())
        scale = max(scale, *(float(side.abs().nan_to_num(0.0).max()) for side in sides if side.numel()))
        if unequal:
            differing += unequal
            distance = (sides[0] - sides[1]).abs().masked_fill(same, 0.0)
            largest = max(largest, float(distance.nan_to_num(math.inf, posinf=math.inf).max()))
    if not differing:
        return None
    relative = largest / scale if scale and math.isfinite(largest) else math.inf
    names = _dtype_names(first, second, name, kind)
    return TensorDifference(kind, name, largest, relative, differing, math.prod(shape), names)


def _blocks(name: str, shape: tuple[int, ...]) -> Iterator[Region]:
    """Runs of rows of at most BLOCK_ELEMENTS (or one row)."""
    if not math.prod(shape):
        return
    if not shape:
        yield Region.whole(name, shape)
        return
    rows = max(1, BLOCK_ELEMENTS // max(math.prod(shape[1:]), 1))
    for row in range(0, shape[0], rows):
        size = (min(rows, shape[0] - row), *shape[1:])
        yield Region(name, shape, (row, *(0 for _ in shape[1:])), size)


def _config_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What the two say of the model that is not the same: of models built here what changes the function or its sizes,
    however it is spelled; of others every key."""
    try:
        sides: list[Mapping[str, Any]] = [asdict(ModelConfig.from_huggingface(config)) for config in (first, second)]
    except ConfigError:
        sides = [first, second]
    names = [*sides[0], *(name for name in sides[1] if name not in sides[0])]
    both = {name: (sides[0].get(name), sides[1].get(name)) for name in names}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}
