"""The mesh: who this rank is on each axis, and with whom it communicates.

Rank order, fastest first: tensor, context, data, pipeline (Megatron's). A `ParallelContext` is made once and handed
down; there is no module-level state, and two contexts can live in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from megatron.config.parallel import ContextAttention
from megatron.parallel.communicator import Communicator, new_communicator
from megatron.utils.errors import ConfigError

MakeCommunicator = Callable[[tuple[int, ...]], Communicator]


@dataclass(frozen=True)
class Grid:
    """How a world of ranks is cut: the sizes of the tensor, context, data and pipeline axes."""

    tensor: int = 1
    context: int = 1
    data: int = 1
    pipeline: int = 1

    @classmethod
    def of_world(cls, world_size: int, tensor: int, pipeline: int, context: int = 1) -> Grid:
        """The grid on `world_size` ranks; the data axis gets what is left. Raises ConfigError if nothing fits."""
        ranks = tensor * context * pipeline
        if world_size % ranks:
            split_sequence = f" x context={context}" if context > 1 else ""
            raise ConfigError(
                f"{world_size} processes cannot be cut into tensor={tensor}{split_sequence} x pipeline={pipeline} = "
                f"{ranks}; start a multiple of {ranks} processes, or change parallel.tensor, parallel.context and "
                "parallel.pipeline."
            )
        return cls(tensor, context, world_size // ranks, pipeline)

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.data * self.pipeline

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """(tensor, context, data, pipeline) coordinates of a global rank."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return tensor, context, data, pipeline

    def rank(self, tensor: int, context: int, data: int, pipeline: int) -> int:
        """The global rank at these coordinates."""
        return ((pipeline * self.data + data) * self.context + context) * self.tensor + tensor

    def groups(self, *along: str) -> list[tuple[int, ...]]:
        """All groups of ranks that differ only along the named axes, each in rank order."""
        sizes = {"tensor": self.tensor, "context": self.context, "data": self.data, "pipeline": self.pipeline}
        assert set(along) <= set(sizes), along
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            fixed = tuple(at for name, at in zip(sizes, self.coordinates(rank), strict=True) if name not in along)
            groups.setdefault(fixed, []).append(rank)
        return [tuple(group) for group in groups.values()]


@dataclass(frozen=True)
class Axis:
    """One group of ranks as this rank sees it: its index `rank` among `size`, the global `ranks`, the communicator.

    An axis of size 1 needs no communicator: its collectives are the identity. An axis without communicator and of
    larger size only describes (parameter layouts, plans) and cannot communicate.
    """

    name: str
    rank: int = 0
    size: int = 1
    ranks: tuple[int, ...] = (0,)
    communicator: Communicator | None = None

    @property
    def comm(self) -> Communicator:
        assert self.communicator is not None, f"axis {self.name} of size {self.size} has no communicator"
        return self.communicator


@dataclass(frozen=True)
class ParallelContext:
    """The axes, by what they are for.

    tp: shares of every layer; cp: parts of every sample's sequence; pp: stages; data: who reads which samples; grad:
    over whom gradients are summed (data x context); shard: consecutive ranks of grad among which optimizer state, and
    under full sharding weights, are divided; replica: ranks of grad that hold the same of it; model: over whom norms
    are summed; loss: over whom loss sums and token counts are summed (all but tensor); embed: first and last stage,
    which both hold a tied embedding; kv: tensor ranks that hold the same key/value head; ring_even, ring_odd: cp again,
    for messages whose sender has an even or an odd index; forward, backward: the pipeline again, one communicator for
    each direction of messages; forward_wrap, backward_wrap: the same between the last stage and the first, in a
    pipeline of several chunks; world: everybody. `sequence` tells whether activations between blocks are split along
    the sequence over tp, `context_attention` how keys and values get about over cp.
    """

    grid: Grid
    rank: int
    tp: Axis
    cp: Axis
    pp: Axis
    data: Axis
    grad: Axis
    shard: Axis
    replica: Axis
    model: Axis
    loss: Axis
    embed: Axis
    kv: Axis
    ring_even: Axis
    ring_odd: Axis
    forward: Axis
    backward: Axis
    forward_wrap: Axis
    backward_wrap: Axis
    world: Axis
    sequence: bool = False
    context_attention: ContextAttention = "ring"

    def axis(self, name: str) -> Axis:
        """The axis with this field name (as a `Piece.copy_axis` holds it)."""
        return getattr(self, name)

    def axes(self) -> Iterator[Axis]:
        """All axes."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Axis):
                yield value


def single_rank() -> ParallelContext:
    """The context of one process alone."""
    return describe(Grid(), 0)


def describe(
    grid: Grid, rank: int, *, sequence: bool = False, num_key_value_heads: int | None = None, shard: int = 1
) -> ParallelContext:
    """The context of any rank of any grid, without communicators: for layouts and plans."""
    return _build(grid, rank, sequence, num_key_value_heads, False, None, shard=shard)


def connect(
    grid: Grid,
    rank: int,
    *,
    sequence: bool = False,
    num_key_value_heads: int | None = None,
    wraps: bool = False,
    context_attention: ContextAttention = "ring",
    shard: int = 1,
    timeout_s: float = 1800.0,
    make: MakeCommunicator | None = None,
) -> ParallelContext:
    """The context of this rank with its process groups; all ranks of an initialised world call it together.

    `wraps` is for pipelines of several chunks, whose last stage sends to the first; `shard` is the size of that axis, a
    divisor of data x context. `make` makes the communicator of a
    group that this rank is in (tests pass a stricter one).
    """
    make = make or (lambda ranks: new_communicator(ranks, timeout_s))
    return _build(grid, rank, sequence, num_key_value_heads, wraps, make, context_attention, shard)


def key_value_copies(tensor: int, num_key_value_heads: int | None) -> int:
    """On how many tensor ranks each key/value head lives. Raises ConfigError where heads cannot be dealt out."""
    heads = num_key_value_heads or tensor
    if tensor % heads and heads % tensor:
        fits = ", ".join(str(size) for size in range(1, 2 * tensor) if size % heads == 0 or heads % size == 0)
        raise ConfigError(
            f"num_key_value_heads={heads} can neither be split over nor copied to parallel.tensor={tensor} ranks "
            f"alike; one must divide the other: use {fits}."
        )
    return max(1, tensor // heads)


def _build(
    grid: Grid,
    rank: int,
    sequence: bool,
    num_key_value_heads: int | None,
    wraps: bool,
    make: MakeCommunicator | None,
    context_attention: ContextAttention = "ring",
    shard: int = 1,
) -> ParallelContext:
    copies = key_value_copies(grid.tensor, num_key_value_heads)
    pipelines = grid.groups("pipeline")
    tensor_groups, context_groups = grid.groups("tensor"), grid.groups("context")
    grad_groups = grid.groups("context", "data")
    assert grid.data * grid.context % shard == 0, (grid, shard)
    members: dict[str, list[tuple[int, ...]]] = {
        "tp": tensor_groups,
        "cp": context_groups,
        "pp": pipelines,
        "data": grid.groups("data"),
        "grad": grad_groups,
        "shard": [group[at : at + shard] for group in grad_groups for at in range(0, len(group), shard)],
        "replica": [group[at::shard] for group in grad_groups for at in range(shard)],
        "model": grid.groups("tensor", "pipeline"),
        "loss": grid.groups("context", "data", "pipeline"),
        "embed": [(group[0], group[-1]) if grid.pipeline > 1 else group for group in pipelines],
        "kv": [group[at : at + copies] for group in tensor_groups for at in range(0, grid.tensor, copies)],
        "ring_even": context_groups,
        "ring_odd": context_groups,
        "forward": pipelines,
        "backward": pipelines,
        "forward_wrap": pipelines,
        "backward_wrap": pipelines,
        "world": grid.groups("tensor", "context", "data", "pipeline"),
    }
    # Some axes only count: stages speak over `forward` and `backward`, gradients are summed over `shard` and `replica`.
    silent = {"pp", "data", "grad"} | (set() if wraps else {"forward_wrap", "backward_wrap"})
    silent |= {"cp"} if context_attention == "ring" else {"ring_even", "ring_odd"}
    axes = {name: _axis(name, groups, rank, None if name in silent else make) for name, groups in members.items()}
    return ParallelContext(
        grid=grid,
        rank=rank,
        sequence=sequence and grid.tensor > 1,
        context_attention=context_attention,
        **axes,
    )


def _axis(name: str, groups: list[tuple[int, ...]], rank: int, make: MakeCommunicator | None) -> Axis:
    """This rank's axis among `groups`; where it is in none of them, it is alone.

    torch names a group by its ranks and by how many groups its members have: so all ranks make one, or none does.
    """
    group = next((group for group in groups if rank in group), (rank,))
    communicator = make(group) if make is not None and max(map(len, groups)) > 1 else None
    return Axis(name, group.index(rank), len(group), group, communicator)
