"""NVIDIA apex's product that adds to a float32 weight gradient, where torch needs a product and a sum.

Of apex's operations only this one is here. Its multi-tensor Adam is not: `amp_C.multi_tensor_adam` takes the number of
updates from the host, and here the device counts them, since a skipped update must not count and no step waits for the
host. The variant for CUDA graphs reads it from the device, but wants weights and gradients of one dtype, which bf16
weights with float32 gradients are not. The project's own update does all of it in one pass over memory already.
"""

from __future__ import annotations

import torch

from megatron.kernels.products import Accumulate
from megatron.kernels.vendor.comparison import Result, require_agreement
from megatron.kernels.vendor.library import Place, import_library
from megatron.utils.errors import ConfigError

KEY = "kernels.apex"
MODULE, FUNCTION = "fused_weight_gradient_mlp_cuda", "wgrad_gemm_accum_fp32"
CURE = (
    "build NVIDIA apex from its repository (NVIDIA/apex) with its C++ and CUDA extensions; the package `apex` on PyPI "
    f"is something else; or use {KEY}=false"
)


def load(place: Place) -> tuple[Accumulate, str]:
    """(sum += grad_outputᵀ · inputs, a clause that describes it).

    Raises ConfigError where library or GPU do not fit, or the numbers are not those of the reference.
    """
    place.require(KEY, (8, 0))
    module = import_library(MODULE, KEY, CURE)
    function = getattr(module, FUNCTION, None)  # apex has no versions to go by
    if function is None:
        raise ConfigError(f"{KEY}=true, but {MODULE} is too old: it has no {FUNCTION}; {CURE}")

    def accumulate(total: torch.Tensor, grad_output: torch.Tensor, inputs: torch.Tensor) -> None:
        function(inputs.contiguous(), grad_output.contiguous(), total)

    errors = require_agreement(KEY, compare(accumulate, place.device))
    return accumulate, f"apex's weight gradients ({errors})"


def compare(accumulate: Accumulate, device: torch.device) -> list[Result]:
    """A sum of [out, in] before which there was something, after two products of bf16."""
    generator = torch.Generator(device).manual_seed(0)
    rows, out, inner = 512, 384, 256
    start = torch.randn((out, inner), generator=generator, device=device)
    parts = [
        tuple(torch.randn((rows, n), generator=generator, device=device).to(torch.bfloat16) for n in (out, inner))
        for _ in range(2)
    ]
    found, reference, exact = start.clone(), start.clone(), start.double()
    for grad_output, inputs in parts:
        accumulate(found, grad_output, inputs)
        reference += grad_output.t() @ inputs
        exact += grad_output.double().t() @ inputs.double()
    return [("sum of weight gradients", found, reference, exact)]
