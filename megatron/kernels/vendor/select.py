"""Which adapters a configuration asks for: loads them, each after its comparison with the reference.

Transformer Engine's FP8 product is not among them, and `kernels.fp8` is refused where the configuration is checked. Its
scales are state from step to step, which checkpoints and every grid would have to carry, its layer keeps weights and
gradients of its own beside the flat buckets, and its bf16 reference says nothing about its numbers: none of that can be
shown to be right without a GPU of compute capability 9.0.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.kernels import KernelsConfig
from megatron.kernels.attention import Attend
from megatron.kernels.products import Accumulate
from megatron.kernels.vendor import apex, flash_attention
from megatron.kernels.vendor.library import Place


@dataclass(frozen=True)
class VendorKernels:
    """Functions to use instead of ours (None: ours), and what to tell of them."""

    attend: Attend | None = None
    accumulate: Accumulate | None = None
    words: tuple[str, ...] = ()


def load_vendor_kernels(
    config: KernelsConfig, place: Place, *, heads: int, key_value_heads: int, head_dim: int
) -> VendorKernels:
    """What the configuration asks for, for one rank's share of the heads. Raises ConfigError where it cannot be had."""
    attend = accumulate = None
    words = []
    if config.flash_attention:
        attend, text = flash_attention.load(place, heads, key_value_heads, head_dim)
        words.append(text)
    if config.apex:
        accumulate, text = apex.load(place)
        words.append(text)
    return VendorKernels(attend, accumulate, tuple(words))
