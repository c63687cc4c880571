"""In which dtype matrix products are computed where the operands' own has no instructions.

CPUs without bfloat16 products fall back to code that is tens of times slower than float32's. There operands are
widened first, which costs one pass over them, and sums are exact to float32 besides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron.utils.device import cpu_multiplies_bfloat16

# (total [out, in], grad_output [n, out], inputs [n, in]): total += grad_outputᵀ · inputs
Accumulate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def operand(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as products take it here: itself, or float32 where this CPU cannot multiply its bfloat16."""
    if tensor.dtype is torch.bfloat16 and tensor.device.type == "cpu" and not cpu_multiplies_bfloat16():
        return tensor.float()
    return tensor


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """inputs [..., in] · weightᵀ [out, in] + bias [out] → [..., out], in the inputs' dtype."""
    offset = None if bias is None else operand(bias)
    return F.linear(operand(inputs), operand(weight), offset).to(inputs.dtype)
