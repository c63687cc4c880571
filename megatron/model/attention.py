"""Causal self-attention with grouped key/value heads (Ainslie et al., 2023), one rank's share of the heads."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from megatron.kernels.attention import Attend, causal_attention
from megatron.kernels.rotary import rotary_split
from megatron.model.alibi import with_biases
from megatron.model.config import ModelConfig
from megatron.model.families.family import Rows
from megatron.model.lora import ColumnAdapter, RowAdapter
from megatron.model.norm import HeadNorms
from megatron.model.placement import LinearSpec, column_spec, row_spec
from megatron.model.places import Places
from megatron.model.recompute import computed_again
from megatron.parallel.context import context_attention
from megatron.parallel.layers import ShardedParameter, column_linear, row_linear
from megatron.parallel.mesh import ParallelContext


class Attention(nn.Module):
    """Query, key and value from one fused product; rotary; scaled dot product; output product.

    The fused weight holds this rank's query rows, then its key rows, then its value rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext,
        index: int,
        dtype: torch.dtype,
        device: torch.device,
        recompute_order: bool = False,
    ) -> None:
        super().__init__()
        layer = config.family.layer(index)
        self.context, self.recompute_order = context, recompute_order
        self.attend: Attend = causal_attention
        self.head_dim = config.head_dim
        self.windowed = config.window_of(index) is not None
        self.num_heads = config.num_attention_heads // context.tp.size
        self.num_key_value_heads = max(1, config.num_key_value_heads // context.tp.size)
        qkv, output = attention_specs(config, context, layer)
        self.qkv = ShardedParameter.empty(qkv.weight, dtype, device)
        self.qkv_bias = None if qkv.bias is None else ShardedParameter.empty(qkv.bias, dtype, device)
        self.output = ShardedParameter.empty(output.weight, dtype, device)
        self.output_bias = None if output.bias is None else ShardedParameter.empty(output.bias, dtype, device)
        self.head_norms = HeadNorms(config, context, layer, dtype, device) if config.query_key_norm else None
        self.column_adapter: ColumnAdapter | None = None
        self.row_adapter: RowAdapter | None = None

    def forward(self, hidden: torch.Tensor, places: Places) -> torch.Tensor:
        """hidden [s, b, h] ([s/tp, b, h] under sequence parallelism) → the same."""
        fused = column_linear(hidden, self.qkv, self.context, self.qkv_bias)  # [s, b, (heads + 2 kv)/tp · d]
        if self.column_adapter is not None:
            fused = self.column_adapter(hidden, fused)
        if self.head_norms is not None:
            fused = self.head_norms(fused, self.num_heads, self.num_key_value_heads)
        runs = places.windowed_runs if self.windowed else places.runs
        query, key, value = rotary_split(fused, places.cos, places.sin, self.num_heads, self.num_key_value_heads)
        if places.biases is not None:
            query, key, value = with_biases(query, key, value, places.biases)
        if runs is None:
            mixed = self.attend(query, key, value)  # [b, heads/tp, s, d]
        else:
            mixed = context_attention(query, key, value, runs, self.context)
        mixed = mixed[..., : self.head_dim]
        kept, dtype = mixed.detach(), fused.dtype
        joined = _join_heads(mixed, dtype)
        with computed_again(joined, lambda: _join_heads(kept, dtype), active=self.recompute_order):
            output = row_linear(joined, self.output, self.context, self.output_bias)
            return output if self.row_adapter is None else self.row_adapter(joined, output)


def _join_heads(mixed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[b, n, s, d] → [s, b, n · d]"""
    return mixed.permute(2, 0, 1, 3).flatten(2).to(dtype)


def attention_specs(config: ModelConfig, context: ParallelContext, layer: str) -> tuple[LinearSpec, LinearSpec]:
    """(fused qkv, output) of one layer on this rank; `layer` is as `model.layers.3`.

    With more tensor ranks than key/value heads each head is copied to `kv.size` ranks, whose gradients are parts:
    each comes from that rank's query heads alone.
    """
    tp, kv, family = context.tp, context.kv, config.family
    heads = config.num_attention_heads // tp.size
    key_heads = max(1, config.num_key_value_heads // tp.size)
    first, first_key = tp.rank * heads, tp.rank // kv.size * key_heads
    queries, keys, values = family.query_key_value(
        config, range(first, first + heads), range(first_key, first_key + key_heads)
    )
    queries, keys = (_pairs_half_a_head_apart(runs, config) for runs in (queries, keys))
    if kv.size > 1:
        keys, values = ([replace(run, copy_axis="kv", copy_rank=kv.rank) for run in runs] for runs in (keys, values))
    rows = [*queries, *keys, *values]
    qkv = column_spec(family, layer, rows, config.hidden_size, bias=config.query_key_value_bias)
    name, width = f"{layer}.{family.attention_output}", config.num_attention_heads * config.head_dim
    return qkv, row_spec(family, context, name, config.hidden_size, width, bias=config.attention_output_bias)


def _pairs_half_a_head_apart(runs: list[Rows], config: ModelConfig) -> list[Rows]:
    """Rows of whole heads in the order in which each pair that is turned lies half a head apart.

    Where only the first elements are turned, their halves are stored one behind the other: each is followed here by
    half of the elements that stay. Queries and keys change alike, so that their products are the same.
    """
    size, half = config.head_dim, (config.rotary_dim + 1) // 2
    rest = size // 2 - half
    if rest == 0 or config.rope_theta is None:
        return runs
    parts = ((0, half), (2 * half, rest), (half, half), (2 * half + rest, rest))
    return [
        replace(run, first=head + first, count=count)
        for run in runs
        for head in range(run.first, run.first + run.count, size)
        for first, count in parts
    ]
