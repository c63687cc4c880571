"""The gated activation of Llama's feed-forward block (Shazeer, 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [..., 2f], gate first → silu(gate) · up [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    # A gate in one block takes silu's vector path to its end, as transformers' does: the same bits on the CPU.
    return F.silu(gate.contiguous()) * up
