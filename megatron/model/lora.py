"""Adapters of low rank (LoRA, Hu et al., 2021): what is trained in place of the weights of linear layers.

A layer x · Wᵀ becomes x · Wᵀ + scale · (x · Aᵀ) · Bᵀ, with A [rank, in] and B [out, rank]. Adapters belong to the
canonical layers, so that a fused product has as many as it is made of, and lie like them: B is cut by rows where W is
and A by columns. The other of the two is the same on all tensor ranks; only what has `rank` features travels for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from megatron.config.lora import LoraConfig
from megatron.model.config import ModelConfig
from megatron.model.initialize import draw_region, initial_values
from megatron.parallel.layers import (
    ShardedParameter,
    add_features,
    copied_spec,
    into_columns,
    row_linear,
    whole_linear,
)
from megatron.parallel.layout import Piece, Region, ShardSpec
from megatron.parallel.mesh import ParallelContext
from megatron.utils.errors import ConfigError

if TYPE_CHECKING:
    from megatron.model.block import Block
    from megatron.model.transformer import ChunkedTransformer, Transformer

DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Lora:
    """Which layers have adapters, and of what kind: `targets` are names within a layer, as `self_attn.q_proj`."""

    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """By which the product counts; `rslora` keeps its size whatever the rank (Kalajdzievski, 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def make_lora(settings: LoraConfig, config: ModelConfig) -> Lora:
    """What the settings ask of a model, where they state a rank. Raises ConfigError for a layer that it has not."""
    assert settings.rank > 0, settings
    alpha = float(settings.rank) if settings.alpha is None else settings.alpha
    return Lora(settings.rank, alpha, bool(settings.rslora), find_targets(settings.targets, config))


def find_targets(words: Sequence[str] | None, config: ModelConfig) -> tuple[str, ...]:
    """The linear layers within a layer of the model that are meant by their last names; None: all of them."""
    layers = linear_layers(config)
    last = {layer: layer.rpartition(".")[2] for layer in layers}
    unknown = [word for word in words or () if word not in last.values()]
    if unknown:
        raise ConfigError(
            f"lora.targets names {', '.join(unknown)}, which a layer of model_type={config.model_type} has not; its "
            f"linear layers are {', '.join(dict.fromkeys(last.values()))}"
        )
    return tuple(layer for layer in layers if words is None or last[layer] in words)


def names_of_targets(targets: Sequence[str], config: ModelConfig) -> list[str]:
    """The inverse of `find_targets`: last names, or where these would mean other layers too, names within a layer."""
    last = dict.fromkeys(target.rpartition(".")[2] for target in targets)
    return list(last) if set(find_targets(list(last), config)) == set(targets) else list(targets)


def linear_layers(config: ModelConfig) -> tuple[str, ...]:
    """The names of all linear layers within a layer of the model, as `self_attn.q_proj`."""
    family = config.family
    heads, key_heads = range(config.num_attention_heads), range(config.num_key_value_heads)
    fused = [run.layer for rows in family.query_key_value(config, heads, key_heads) for run in rows]
    return (*dict.fromkeys(fused), family.attention_output, *family.feed_forward_input, family.feed_forward_output)


def adapter_of(name: str) -> str | None:
    """The linear layer whose adapter the weight of this canonical name belongs to; None for one of the model's own."""
    return next((name.removesuffix(part) for part in (DOWN, UP) if name.endswith(part)), None)


class ColumnAdapter(nn.Module):
    """The adapters of the layers that a column-parallel product is made of, beside its weight's `spec`."""

    def __init__(
        self, spec: ShardSpec, context: ParallelContext, lora: Lora, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.context, self.scale, self.rank = context, lora.scale, lora.rank
        runs = [run for run in _runs(spec) if run.name.endswith(_endings(lora))]
        self.firsts = [run.first for run in runs]
        downs = [copied_spec(context, run.name + DOWN, (lora.rank, spec.shape[1])) for run in runs]
        self.down = ShardedParameter.empty(_stacked(downs), dtype, device)
        self.up = nn.ParameterList(ShardedParameter.empty(run.up_spec(lora.rank), dtype, device) for run in runs)

    def forward(self, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The product's inputs [s, b, in] ([s/tp, b, in] under sequence parallelism) and output [s, b, out/tp] → the
        output with the adapters' added, in place."""
        reduced = into_columns(whole_linear(inputs, self.down) * self.scale, self.context)  # [s, b, adapters · rank]
        parts = reduced.split(self.rank, dim=-1)
        return add_features(output, self.firsts, [whole_linear(*pair) for pair in zip(parts, self.up, strict=True)])


class RowAdapter(nn.Module):
    """The adapter of a row-parallel layer, beside its weight's `spec`."""

    def __init__(
        self, spec: ShardSpec, context: ParallelContext, lora: Lora, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.context, self.scale = context, lora.scale
        (piece,) = spec.pieces
        name = piece.region.name.removesuffix(".weight")
        (out_features, in_features), (_, first) = piece.turn(piece.region.shape), piece.turn(piece.region.start)
        columns = spec.shape[1]
        region = Region(name + DOWN, (lora.rank, in_features), (0, first), (lora.rank, columns))
        self.down = ShardedParameter.empty(ShardSpec((lora.rank, columns), (Piece(region, (0, 0)),)), dtype, device)
        self.up = ShardedParameter.empty(copied_spec(context, name + UP, (out_features, lora.rank)), dtype, device)

    def forward(self, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The layer's inputs [s, b, in/tp] and output [s, b, out] ([s/tp, b, out] under sequence parallelism) → the
        output with the adapter's added, in place."""
        reduced = row_linear(inputs, self.down, self.context) * self.scale  # [s, b, rank], or [s/tp, b, rank]
        return add_features(output, [0], [whole_linear(reduced, self.up)])


@dataclass(frozen=True)
class _Run:
    """The rows of a column-parallel weight that are one canonical layer's, from row `first` on."""

    name: str
    first: int
    pieces: tuple[Piece, ...]

    def up_spec(self, rank: int) -> ShardSpec:
        """Where B lies: its rows are the layer's, in the same order and copied like them."""
        pieces = []
        for piece in self.pieces:
            out_features, start = piece.turn(piece.region.shape)[0], piece.turn(piece.region.start)[0]
            region = Region(self.name + UP, (out_features, rank), (start, 0), (piece.size[0], rank))
            offset = (piece.offset[0] - self.first, 0)
            pieces.append(replace(piece, region=region, offset=offset, transposed=False))
        return ShardSpec((sum(piece.size[0] for piece in pieces), rank), tuple(pieces))


def _runs(spec: ShardSpec) -> Iterator[_Run]:
    names = list(dict.fromkeys(piece.region.name for piece in spec.pieces))
    for name in names:
        pieces = tuple(piece for piece in spec.pieces if piece.region.name == name)
        first, stop = pieces[0].offset[0], pieces[-1].offset[0] + pieces[-1].size[0]
        assert stop - first == sum(piece.size[0] for piece in pieces), f"the rows of {name} do not lie together"
        yield _Run(name.removesuffix(".weight"), first, pieces)


def _stacked(specs: Sequence[ShardSpec]) -> ShardSpec:
    """Weights of equal width, one below the other."""
    pieces, row = [], 0
    for spec in specs:
        pieces += [replace(piece, offset=(piece.offset[0] + row, 0)) for piece in spec.pieces]
        row += spec.shape[0]
    return ShardSpec((row, specs[0].shape[1]), tuple(pieces))


def _endings(lora: Lora) -> tuple[str, ...]:
    return tuple(f".{target}" for target in lora.targets)


def adapt(model: Transformer | ChunkedTransformer, lora: Lora) -> None:
    """Give the layers of a built model their adapters, whose values are not set, and leave its own weights as they are
    from now on."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in (cast("Block", block) for chunk in model.chunks for block in chunk.blocks):
        for part, column in ((block.attention, block.attention.qkv), (block.feed_forward, block.feed_forward.input)):
            kind = column.dtype, column.device
            if _is_adapted(column.spec, lora):
                part.column_adapter = ColumnAdapter(column.spec, model.context, lora, *kind)
            if _is_adapted(part.output.spec, lora):
                part.row_adapter = RowAdapter(part.output.spec, model.context, lora, *kind)


def _is_adapted(spec: ShardSpec, lora: Lora) -> bool:
    return any(piece.region.name.removesuffix(".weight").endswith(_endings(lora)) for piece in spec.pieces)


def adapter_values(config: ModelConfig, seed: int) -> Callable[[Region, torch.Tensor], None]:
    """As `initial_values`, of adapters too: A as PEFT begins it, uniform within 1/√in; B zero, so that nothing changes
    at first."""
    others = initial_values(config, seed)

    def fill(region: Region, out: torch.Tensor) -> None:
        if region.name.endswith(DOWN):
            bound = 1.0 / math.sqrt(region.shape[1])
            draw_region(region, out, seed, lambda block, generator: block.uniform_(-bound, bound, generator=generator))
        elif region.name.endswith(UP):
            out.zero_()
        else:
            others(region, out)

    return fill
