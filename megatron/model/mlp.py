"""Llama's feed-forward block: one fused gate and up product, SwiGLU, the down product."""

from __future__ import annotations

import torch
from torch import nn

from megatron.kernels.swiglu import swiglu
from megatron.model.config import ModelConfig
from megatron.model.recompute import computed_again
from megatron.parallel.layers import ShardedParameter, column_linear, row_linear
from megatron.parallel.layout import Piece, Region, ShardSpec
from megatron.parallel.mesh import ParallelContext


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)); the fused weight holds this rank's gate rows, then its up rows."""

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext,
        prefix: str,
        dtype: torch.dtype,
        device: torch.device,
        recompute_product: bool = False,
    ) -> None:
        super().__init__()
        self.context, self.recompute_product = context, recompute_product
        gate_up, down = feed_forward_specs(config, context, prefix)
        self.gate_up = ShardedParameter.create(torch.empty(gate_up.shape, dtype=dtype, device=device), gate_up)
        self.down = ShardedParameter.create(torch.empty(down.shape, dtype=dtype, device=device), down)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [s, b, h] ([s/tp, b, h] under sequence parallelism) → the same."""
        gate_up = column_linear(hidden, self.gate_up, self.context)  # [s, b, 2 f/tp]
        inner, kept = swiglu(gate_up), gate_up.detach()  # [s, b, f/tp]
        with computed_again(inner, lambda: swiglu(kept), active=self.recompute_product):
            return row_linear(inner, self.down, self.context)


def feed_forward_specs(config: ModelConfig, context: ParallelContext, prefix: str) -> tuple[ShardSpec, ShardSpec]:
    """(fused gate and up, down) of one layer on this rank; `prefix` is as `model.layers.3.mlp`."""
    tp, hidden, inner = context.tp, config.hidden_size, config.intermediate_size
    rows = inner // tp.size
    pieces = tuple(
        Piece(Region(f"{prefix}.{name}.weight", (inner, hidden), (tp.rank * rows, 0), (rows, hidden)), (at * rows, 0))
        for at, name in enumerate(("gate_proj", "up_proj"))
    )
    down = Region(f"{prefix}.down_proj.weight", (hidden, inner), (0, tp.rank * rows), (hidden, rows))
    return ShardSpec((2 * rows, hidden), pieces), ShardSpec((hidden, rows), (Piece(down, (0, 0)),))
