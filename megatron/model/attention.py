"""Causal self-attention with grouped key/value heads (Ainslie et al., 2023), one rank's share of the heads."""

from __future__ import annotations

import torch
from torch import nn

from megatron.kernels.attention import Attend, causal_attention
from megatron.kernels.rotary import rotary_split
from megatron.model.config import ModelConfig
from megatron.model.recompute import computed_again
from megatron.parallel.layers import ShardedParameter, column_linear, row_linear
from megatron.parallel.layout import Piece, Region, ShardSpec
from megatron.parallel.mesh import ParallelContext


class Attention(nn.Module):
    """Query, key and value from one fused product; rotary; scaled dot product; output product.

    The fused weight holds this rank's query rows, then its key rows, then its value rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext,
        prefix: str,
        dtype: torch.dtype,
        device: torch.device,
        recompute_order: bool = False,
    ) -> None:
        super().__init__()
        self.context, self.recompute_order = context, recompute_order
        self.attend: Attend = causal_attention
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads // context.tp.size
        self.num_key_value_heads = max(1, config.num_key_value_heads // context.tp.size)
        qkv, output = attention_specs(config, context, prefix)
        self.qkv = ShardedParameter.create(torch.empty(qkv.shape, dtype=dtype, device=device), qkv)
        self.output = ShardedParameter.create(torch.empty(output.shape, dtype=dtype, device=device), output)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """hidden [s, b, h] ([s/tp, b, h] under sequence parallelism) → the same; cos and sin [s, d]."""
        fused = column_linear(hidden, self.qkv, self.context)  # [s, b, (heads + 2 kv)/tp · d]
        query, key, value = rotary_split(fused, cos, sin, self.num_heads, self.num_key_value_heads)
        mixed = self.attend(query, key, value)  # [b, heads/tp, s, d]
        kept, dtype = mixed.detach(), fused.dtype
        joined = _join_heads(mixed, dtype)
        with computed_again(joined, lambda: _join_heads(kept, dtype), active=self.recompute_order):
            return row_linear(joined, self.output, self.context)


def _join_heads(mixed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[b, n, s, d] → [s, b, n · d]"""
    return mixed.permute(2, 0, 1, 3).flatten(2).to(dtype)


def attention_specs(config: ModelConfig, context: ParallelContext, prefix: str) -> tuple[ShardSpec, ShardSpec]:
    """(fused qkv, output) of one layer on this rank; `prefix` is as `model.layers.3.self_attn`.

    With more tensor ranks than key/value heads each head is copied to `kv.size` ranks, whose gradients are parts:
    each comes from that rank's query heads alone.
    """
    tp, kv, d, hidden = context.tp, context.kv, config.head_dim, config.hidden_size
    query_rows = config.num_attention_heads // tp.size * d
    key_rows = max(1, config.num_key_value_heads // tp.size) * d
    key_start = tp.rank // kv.size * key_rows
    all_keys = config.num_key_value_heads * d
    all_queries = config.num_attention_heads * d
    pieces = [
        Piece(
            Region(f"{prefix}.q_proj.weight", (all_queries, hidden), (tp.rank * query_rows, 0), (query_rows, hidden)),
            (0, 0),
        )
    ]
    for at, name in enumerate(("k_proj", "v_proj")):
        region = Region(f"{prefix}.{name}.weight", (all_keys, hidden), (key_start, 0), (key_rows, hidden))
        place, copied = (query_rows + at * key_rows, 0), kv.size > 1
        pieces.append(Piece(region, place, copy_axis="kv" if copied else None, copy_rank=kv.rank, partial=copied))
    qkv = ShardSpec((query_rows + 2 * key_rows, hidden), tuple(pieces))
    output = Region(f"{prefix}.o_proj.weight", (hidden, all_queries), (0, tp.rank * query_rows), (hidden, query_rows))
    return qkv, ShardSpec((hidden, query_rows), (Piece(output, (0, 0)),))
