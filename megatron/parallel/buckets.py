"""Flat buffers: which parameters lie where, and which part of each bucket a rank owns.

Parameters become views of flat weight buffers, and their gradients views of flat gradient buffers of the same layout.
The layout is a function of the parameters' specs alone, so ranks that hold copies of a parameter agree on it. With
optimizer sharding (ZeRO-1, Rajbhandari et al., 2020) each rank owns an even flat range of every bucket; otherwise all
of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from megatron.parallel.layers import ShardedParameter
from megatron.parallel.layout import Piece, ShardSpec
from megatron.parallel.mesh import Axis

# Parameters begin at multiples of this many elements, so that wide loads stay aligned.
ALIGNMENT = 64
# Large enough for full network bandwidth, small enough to start reducing early in the backward pass; with many data
# ranks also large enough that each rank's share of a bucket is more than latency.
_BUCKET_ELEMENTS, _SHARE_ELEMENTS = 40_000_000, 1_000_000


@dataclass(frozen=True)
class Slot:
    """A parameter in its bucket: elements `start … start + numel` of the flat buffers."""

    name: str
    parameter: ShardedParameter
    start: int

    @property
    def spec(self) -> ShardSpec:
        return self.parameter.spec

    @property
    def stop(self) -> int:
        return self.start + self.spec.numel

    @property
    def is_matrix(self) -> bool:
        return len(self.spec.shape) > 1


@dataclass(frozen=True)
class Bucket:
    """One flat run of parameters; `owned` is the range whose optimizer state this rank keeps."""

    slots: tuple[Slot, ...]
    weights: torch.Tensor
    gradients: torch.Tensor
    owned: tuple[int, int]

    @property
    def owned_weights(self) -> torch.Tensor:
        return self.weights[self.owned[0] : self.owned[1]]

    @property
    def owned_gradients(self) -> torch.Tensor:
        return self.gradients[self.owned[0] : self.owned[1]]

    def owned_slots(self) -> Iterator[tuple[Slot, int, int]]:
        """Each parameter that meets the owned range, with the common part as offsets into the owned range."""
        low, high = self.owned
        for slot in self.slots:
            start, stop = max(slot.start, low), min(slot.stop, high)
            if start < stop:
                yield slot, start - low, stop - low

    def owned_pieces(self, flat: torch.Tensor) -> Iterator[tuple[Slot, Piece, torch.Tensor]]:
        """Views of `flat`, a tensor laid out like the owned range, by parameter and piece."""
        for slot, start, stop in self.owned_slots():
            offset = self.owned[0] + start - slot.start
            for piece, _, view in slot.spec.flat_pieces(flat[start:stop], offset):
                yield slot, piece, view


def build_buckets(
    model: torch.nn.Module,
    grad: Axis,
    *,
    zero: int,
    gradient_dtype: torch.dtype,
    bucket_elements: int | None = None,
) -> list[Bucket]:
    """Move the model's parameters into flat buffers, in the order in which their gradients become ready.

    Weights keep their values. A tied embedding that lives on two stages has a bucket of its own, since those two
    stages must agree on its layout.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters()]
    bucket_elements = bucket_elements or max(_BUCKET_ELEMENTS, _SHARE_ELEMENTS * grad.size)
    buckets = []
    for group in _group(list(reversed(named)), bucket_elements):
        buckets.append(_fill(group, grad, zero, gradient_dtype))
    return buckets


def _group(
    named: Sequence[tuple[str, torch.nn.Parameter]], bucket_elements: int
) -> list[list[tuple[str, ShardedParameter]]]:
    groups: list[list[tuple[str, ShardedParameter]]] = []
    size, closed = 0, True
    for name, parameter in named:
        assert hasattr(parameter, "spec"), name  # not its class, which fake tensors do not keep
        parameter = cast(ShardedParameter, parameter)
        alone = any(piece.copy_axis == "embed" for piece in parameter.spec.pieces)
        if closed or alone or size + parameter.spec.numel > bucket_elements:
            groups.append([])
            size = 0
        groups[-1].append((name, parameter))
        size += parameter.spec.numel
        closed = alone
    return groups


def _fill(group: list[tuple[str, ShardedParameter]], grad: Axis, zero: int, gradient_dtype: torch.dtype) -> Bucket:
    slots, size = [], 0
    for name, parameter in group:
        slots.append(Slot(name, parameter, size))
        size += -(-parameter.spec.numel // ALIGNMENT) * ALIGNMENT
    unit = ALIGNMENT * grad.size
    size = -(-size // unit) * unit
    first = group[0][1]
    weights = torch.zeros(size, dtype=first.dtype, device=first.device)
    gradients = torch.zeros(size, dtype=gradient_dtype, device=first.device)
    for slot in slots:
        view = weights[slot.start : slot.stop].view(slot.spec.shape)
        view.copy_(slot.parameter.data)
        slot.parameter.data = view
    share = size // grad.size
    owned = (grad.rank * share, (grad.rank + 1) * share) if zero else (0, size)
    return Bucket(tuple(slots), weights, gradients, owned)
