"""The feed-forward block: one input product, the activation, the output product."""

from __future__ import annotations

import torch
from torch import nn

from megatron.kernels.gelu import gelu, gelu_tanh
from megatron.kernels.swiglu import swiglu
from megatron.model.config import ModelConfig
from megatron.model.families.family import Rows
from megatron.model.lora import ColumnAdapter, RowAdapter
from megatron.model.placement import LinearSpec, column_spec, row_spec
from megatron.model.recompute import computed_again
from megatron.parallel.layers import ShardedParameter, column_linear, row_linear
from megatron.parallel.mesh import ParallelContext


class FeedForward(nn.Module):
    """output(activation(input(x))), in SwiGLU output(silu(gate(x)) · up(x)); `layer` is as `model.layers.3`.

    SwiGLU's fused input weight holds this rank's gate rows, then its up rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext,
        layer: str,
        dtype: torch.dtype,
        device: torch.device,
        recompute_product: bool = False,
    ) -> None:
        super().__init__()
        self.context, self.recompute_product = context, recompute_product
        self.activate = {"silu": swiglu, "gelu": gelu, "gelu_new": gelu_tanh}[config.hidden_act]
        inputs, output = feed_forward_specs(config, context, layer)
        self.input = ShardedParameter.empty(inputs.weight, dtype, device)
        self.input_bias = None if inputs.bias is None else ShardedParameter.empty(inputs.bias, dtype, device)
        self.output = ShardedParameter.empty(output.weight, dtype, device)
        self.output_bias = None if output.bias is None else ShardedParameter.empty(output.bias, dtype, device)
        self.column_adapter: ColumnAdapter | None = None
        self.row_adapter: RowAdapter | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [s, b, h] ([s/tp, b, h] under sequence parallelism) → the same."""
        before = column_linear(hidden, self.input, self.context, self.input_bias)  # [s, b, f/tp], or gated 2 f/tp
        if self.column_adapter is not None:
            before = self.column_adapter(hidden, before)
        inner, kept = self.activate(before), before.detach()  # [s, b, f/tp]
        with computed_again(inner, lambda: self.activate(kept), active=self.recompute_product):
            output = row_linear(inner, self.output, self.context, self.output_bias)
            return output if self.row_adapter is None else self.row_adapter(inner, output)


def feed_forward_specs(config: ModelConfig, context: ParallelContext, layer: str) -> tuple[LinearSpec, LinearSpec]:
    """(input, output) of one layer on this rank; `layer` is as `model.layers.3`."""
    family, inner = config.family, config.intermediate_size
    share = inner // context.tp.size
    rows = [Rows(name, inner, context.tp.rank * share, share) for name in family.feed_forward_input]
    inputs = column_spec(family, layer, rows, config.hidden_size, bias=config.mlp_bias)
    name = f"{layer}.{family.feed_forward_output}"
    return inputs, row_spec(family, context, name, config.hidden_size, inner, bias=config.mlp_bias)
