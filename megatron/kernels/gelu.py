"""The Gaussian error linear unit (Hendrycks and Gimpel, 2016), exact and as its tanh approximation.

torch's own: one pass each way on the CPU and on GPUs, computed in float32 for narrower inputs. There is nothing left
to fuse but the bias, which the product before it adds.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from megatron.kernels.numerics import statistics_dtype


def gelu(inputs: torch.Tensor) -> torch.Tensor:
    """x · Φ(x), element by element."""
    return F.gelu(inputs)


def gelu_tanh(inputs: torch.Tensor) -> torch.Tensor:
    """The approximation that GPT-2 was trained with: Φ by tanh. Hugging Face calls it `gelu_new`."""
    return F.gelu(inputs, approximate="tanh")


def gelu_reference(inputs: torch.Tensor) -> torch.Tensor:
    """The formula itself, rounded once."""
    wide = inputs.to(statistics_dtype(inputs.dtype))
    return (0.5 * wide * (1.0 + torch.erf(wide / math.sqrt(2.0)))).to(inputs.dtype)


def gelu_tanh_reference(inputs: torch.Tensor) -> torch.Tensor:
    """Equation 2 of the paper's approximations, rounded once."""
    wide = inputs.to(statistics_dtype(inputs.dtype))
    inner = math.sqrt(2.0 / math.pi) * (wide + 0.044715 * wide**3)
    return (0.5 * wide * (1.0 + torch.tanh(inner))).to(inputs.dtype)
