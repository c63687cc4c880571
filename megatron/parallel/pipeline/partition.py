"""Which layers each pipeline stage holds.

The model is cut into parts in the order of its layers; with several chunks a stage, part c · stages + i is chunk c of
stage i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.config.parallel import LayerSplit


@dataclass(frozen=True)
class Part:
    """A run of layers; the first part has the embedding besides, the last one the final norm and the output product."""

    layers: range
    first: bool
    last: bool


def cut(num_layers: int, parts: int, split: LayerSplit = "even", head_cost: float = 0.0) -> list[Part]:
    """The parts of a model, in order.

    `even` gives the earlier parts one layer more where shares do not come out even: the last part has the output
    product besides. `balanced` counts that product as `head_cost` layers and keeps the largest part small. Numbers are
    the layers of each part, which add up to `num_layers`.
    """
    if split == "even":
        counts = _even(num_layers, parts)
    elif split == "balanced":
        counts = _balanced(num_layers, parts, head_cost)
    else:
        counts = split
    assert len(counts) == parts and sum(counts) == num_layers, (split, parts, num_layers)
    starts = [sum(counts[:part]) for part in range(parts)]
    return [
        Part(range(start, start + count), part == 0, part == parts - 1)
        for part, (start, count) in enumerate(zip(starts, counts, strict=True))
    ]


def parts_of_stage(parts: Sequence[Part], stages: int, stage: int) -> list[Part]:
    """The chunks of one stage."""
    return list(parts[stage::stages])


def describe_partition(parts: Sequence[Part]) -> str:
    """The number of layers of each part, as `3 + 2`."""
    return " + ".join(str(len(part.layers)) for part in parts)


def _even(num_layers: int, parts: int) -> tuple[int, ...]:
    share, extra = divmod(num_layers, parts)
    return tuple(share + (1 if part < extra else 0) for part in range(parts))


def _balanced(num_layers: int, parts: int, head_cost: float) -> tuple[int, ...]:
    """Deal out one layer at a time to the part that has least to do; every part gets at least one."""
    costs = [1.0] * (parts - 1) + [1.0 + head_cost]
    for _ in range(num_layers - parts):
        costs[costs.index(min(costs))] += 1.0
    costs[-1] -= head_cost
    return tuple(round(cost) for cost in costs)
