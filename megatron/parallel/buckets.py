"""Flat buffers: which parameters lie where, and which part of each bucket a rank owns.

Parameters become views of flat weight buffers, and their gradients views of flat gradient buffers of the same layout.
The layout is a function of the parameters' specs alone, so ranks that hold copies of a parameter agree on it. With
optimizer sharding (ZeRO-1, Rajbhandari et al., 2020) each rank owns an even flat range of every bucket; otherwise all
of it. With full sharding (ZeRO-3; Zhao et al., 2023) a rank keeps that range alone: a bucket is what one layer of the
model holds, and its flat buffers have storage only while that layer works.

Weights that are not trained lie in flat buffers of their own, without gradients and optimizer state. They are divided
under full sharding alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import nn

from megatron.parallel.layers import ShardedParameter
from megatron.parallel.layout import Piece, Region, ShardSpec
from megatron.parallel.mesh import Axis

# Parameters begin at multiples of this many elements, so that wide loads stay aligned.
ALIGNMENT = 64
# Large enough for full network bandwidth, small enough to start reducing early in the backward pass; with many data
# ranks also large enough that each rank's share of a bucket is more than latency.
_BUCKET_ELEMENTS, _SHARE_ELEMENTS = 40_000_000, 1_000_000

Named = list[tuple[str, ShardedParameter]]


@dataclass(frozen=True)
class Unit:
    """Modules that a forward pass calls one after the other, and whose weights it needs together: a layer.

    `backward_reads` tells whether the backward pass reads weights, `backward_follows` whether in most schedules it
    follows the forward pass at once.
    """

    modules: tuple[nn.Module, ...]
    backward_reads: bool = True
    backward_follows: bool = False

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of its modules."""
        return [parameter for module in self.modules for parameter in module.parameters()]


class Units(Protocol):
    """A part of a model that can say what its forward pass calls, in order."""

    @property
    def units(self) -> list[Unit]: ...


class Chunked(Protocol):
    """A model in parts, each of which runs as a whole."""

    @property
    def chunks(self) -> Sequence[Units]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def modules(self) -> Iterator[nn.Module]: ...


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
class FlatWeights:
    """One flat run of parameters. `owned` is the range that this rank keeps; `owned_weights` holds it: a view of the
    flat buffer, or with full sharding (`sharded`) a tensor of its own."""

    slots: tuple[Slot, ...]
    weights: torch.Tensor
    owned: tuple[int, int]
    owned_weights: torch.Tensor
    sharded: bool

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

    def owned_regions(self, flat: torch.Tensor, copies: bool = True) -> Iterator[tuple[Region, torch.Tensor]]:
        """Views of `flat`, a tensor laid out like the owned range, as rectangles of canonical tensors;
        `copies=False` leaves out extra copies."""
        for slot, start, stop in self.owned_slots():
            yield from slot.spec.flat_regions(flat[start:stop], self.owned[0] + start - slot.start, copies)


@dataclass(frozen=True)
class Bucket(FlatWeights):
    """Parameters that are trained, with their gradients: `slot_gradients` are views of these in the parameters' shapes.
    `owned` is the range whose optimizer state this rank keeps, `owned_gradients` its gradients, as `owned_weights` its
    weights."""

    gradients: torch.Tensor
    owned_gradients: torch.Tensor
    slot_gradients: tuple[torch.Tensor, ...]


def build_buckets(
    model: Chunked,
    shard: Axis,
    *,
    zero: int,
    gradient_dtype: torch.dtype,
    bucket_elements: int | None = None,
    device: torch.device | None = None,
) -> list[Bucket]:
    """Move the parameters that are trained into flat buffers, in the order in which their gradients become ready.

    Weights keep their values; of a model on torch's meta device they are zero, and on `device`. A tied embedding that
    lives on two stages has a bucket of its own, since those two stages must agree on its layout. With `zero` 3 there is
    a bucket for each layer of the model, else they hold at least `bucket_elements` where there are as many.
    """
    groups = _groups(model, shard, zero, bucket_elements, trained=True)
    buckets = [_add_gradients(_fill(group, shard, zero, device), gradient_dtype) for group in groups]
    _register(model, groups, buckets)
    return buckets


def flatten_frozen(
    model: Chunked, shard: Axis, *, zero: int, bucket_elements: int | None = None, device: torch.device | None = None
) -> list[FlatWeights]:
    """The same with the parameters that are not trained, of which ranks own different ranges with `zero` 3 alone."""
    groups = _groups(model, shard, zero, bucket_elements, trained=False)
    flats = [_fill(group, shard, 3 if zero == 3 else 0, device) for group in groups]
    _register(model, groups, flats)
    return flats


def has_storage(flat: torch.Tensor) -> bool:
    """Whether a flat buffer has storage now."""
    return flat.untyped_storage().nbytes() > 0


def give_storage(flat: torch.Tensor) -> None:
    """Give a flat buffer storage, of undefined content. Views of it, those that autograd keeps as well, see it."""
    flat.untyped_storage().resize_(flat.numel() * flat.element_size())


def take_storage(flat: torch.Tensor) -> None:
    """Free the storage of a flat buffer, which is the views' as well."""
    flat.untyped_storage().resize_(0)


def _groups(model: Chunked, shard: Axis, zero: int, bucket_elements: int | None, trained: bool) -> list[Named]:
    """The parameters, either those that are trained or the others, bucket by bucket."""
    named: Named = []
    for name, parameter in model.named_parameters():
        assert hasattr(parameter, "spec"), name  # not its class, which fake tensors do not keep
        if parameter.requires_grad == trained:
            named.append((name, cast(ShardedParameter, parameter)))
    if zero == 3:
        return [group for unit in _by_unit(model, named) for group in _group(unit, None)]
    return _group(named[::-1], bucket_elements or max(_BUCKET_ELEMENTS, _SHARE_ELEMENTS * shard.size))


def _by_unit(model: Chunked, named: Named) -> list[Named]:
    """The parameters of each unit that no unit before it has, the last unit first."""
    names = {id(parameter): name for name, parameter in named}
    units = []
    for unit in (unit for chunk in model.chunks for unit in chunk.units):
        mine = {id(parameter): parameter for parameter in unit.parameters() if id(parameter) in names}
        units.append([(names.pop(key), cast(ShardedParameter, parameter)) for key, parameter in mine.items()][::-1])
    assert not names, f"no unit has {', '.join(names.values())}"
    return units[::-1]


def _group(named: Named, bucket_elements: int | None) -> list[Named]:
    groups: list[Named] = []
    size, closed = 0, True
    for name, parameter in named:
        alone = any(piece.copy_axis == "embed" for piece in parameter.spec.pieces)
        full = bucket_elements is not None and size + parameter.spec.numel > bucket_elements
        if closed or alone or full:
            groups.append([])
            size = 0
        groups[-1].append((name, parameter))
        size += parameter.spec.numel
        closed = alone
    return groups


def _fill(group: Named, shard: Axis, zero: int, device: torch.device | None) -> FlatWeights:
    starts, size = [], 0
    for _, parameter in group:
        starts.append(size)
        size += -(-parameter.spec.numel // ALIGNMENT) * ALIGNMENT
    unit = ALIGNMENT * shard.size
    size = -(-size // unit) * unit
    weights = torch.zeros(size, dtype=group[0][1].dtype, device=device or group[0][1].device)
    slots = []
    for (name, parameter), start in zip(group, starts, strict=True):
        view = weights[start : start + parameter.spec.numel].view(parameter.spec.shape)
        slots.append(Slot(name, _move(parameter, view), start))
    share = size // shard.size
    owned = (shard.rank * share, (shard.rank + 1) * share) if zero else (0, size)
    owned_weights = weights[owned[0] : owned[1]]
    if zero == 3:
        owned_weights = owned_weights.clone()
        take_storage(weights)
    return FlatWeights(tuple(slots), weights, owned, owned_weights, sharded=zero == 3)


def _add_gradients(flat: FlatWeights, dtype: torch.dtype) -> Bucket:
    gradients = torch.zeros_like(flat.weights, dtype=dtype)
    views = tuple(gradients[slot.start : slot.stop].view(slot.spec.shape) for slot in flat.slots)
    owned_gradients = gradients[flat.owned[0] : flat.owned[1]]
    if flat.sharded:
        owned_gradients = owned_gradients.clone()
        take_storage(gradients)
    return Bucket(
        flat.slots,
        flat.weights,
        flat.owned,
        flat.owned_weights,
        flat.sharded,
        gradients=gradients,
        owned_gradients=owned_gradients,
        slot_gradients=views,
    )


def _move(parameter: ShardedParameter, view: torch.Tensor) -> ShardedParameter:
    """The parameter with its values in `view`; one without values, on the meta device, gives way to a new one."""
    if parameter.device.type == "meta" and view.device.type != "meta":
        # Through `.data`, as below: autograd then does not take a gather for a change of what it keeps.
        return ShardedParameter.create(view.data, parameter.spec, parameter.uses, parameter.requires_grad)
    view.copy_(parameter.data)
    parameter.data = view
    return parameter


def _register(model: Chunked, groups: list[Named], flats: Sequence[FlatWeights]) -> None:
    """Put the new parameters in the places of the old ones."""
    new = {
        id(old): slot.parameter
        for group, flat in zip(groups, flats, strict=True)
        for (_, old), slot in zip(group, flat.slots, strict=True)
    }
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if new.get(id(parameter), parameter) is not parameter:
                setattr(module, name, new[id(parameter)])
