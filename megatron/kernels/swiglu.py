"""The gated activation of Llama's feed-forward block (Shazeer, 2020)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron.kernels.native import Kernel
from megatron.kernels.numerics import statistics_dtype
from megatron.kernels.operation import define, define_backward

_FORWARD, _BACKWARD = Kernel("swiglu", "ppii"), Kernel("swiglu_backward", "pppii")


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [..., 2f], gate first → silu(gate) · up [..., f], rounded once."""
    return _SWIGLU(gate_up)


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The formula itself."""
    gate, up = gate_up.to(statistics_dtype(gate_up.dtype)).chunk(2, dim=-1)
    # A gate in one block takes silu's vector path to its end, as transformers' does: the same bits on the CPU.
    return (F.silu(gate.contiguous()) * up).to(gate_up.dtype)


def swiglu_backward_reference(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Gradient of gate_up."""
    dtype = statistics_dtype(gate_up.dtype)
    gate, up = gate_up.to(dtype).chunk(2, dim=-1)
    upstream, share = grad.to(dtype), torch.sigmoid(gate)
    grad_gate = upstream * up * share * (1 + gate * (1 - share))
    return torch.cat((grad_gate, upstream * gate * share), dim=-1).to(gate_up.dtype)


def _native(gate_up: torch.Tensor) -> torch.Tensor | None:
    gate_up, output = gate_up.contiguous(), _fake(gate_up)
    done = _FORWARD(gate_up, gate_up, output, *_rows_and_width(output))
    return output if done else None


def _native_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor | None:
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    grad_gate_up = torch.empty_like(gate_up)
    done = _BACKWARD(gate_up, grad, gate_up, grad_gate_up, *_rows_and_width(grad))
    return grad_gate_up if done else None


def _rows_and_width(output: torch.Tensor) -> tuple[int, int]:
    width = output.shape[-1]
    return output.numel() // max(width, 1), width


def _fake(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


_SWIGLU = define("swiglu(Tensor gate_up) -> Tensor", reference=swiglu_reference, native=_native, fake=_fake)
_SWIGLU_BACKWARD = define(
    "swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor",
    reference=swiglu_backward_reference,
    native=_native_backward,
    fake=lambda grad, gate_up: gate_up.new_empty(gate_up.shape),
)


def _keep(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    return _SWIGLU_BACKWARD(grad, *ctx.saved_tensors)


define_backward("swiglu", _backward, _keep)
