"""The `kernels` section: whose code computes the operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.key import key


@dataclass(frozen=True)
class KernelsConfig:
    """The project's compiled kernels, and libraries of others that are used only where they are asked for.

    A library is compared with the reference on the present GPU at start, and refused where its numbers differ. See
    docs/kernels.md; `megatron doctor` says what is there.
    """

    backend: Literal["auto", "native", "reference"] = key(
        "auto",
        "`native`: compiled kernels, an error where there are none; `reference`: plain PyTorch, slower; "
        "`auto`: compiled kernels where there are some.",
    )
    attention: Literal["auto", "eager"] = key(
        "auto",
        "`eager` keeps the probabilities of all pairs, as systems before flash attention did: slower and larger, for "
        "reproducing and planning those.",
    )
    flash_attention: bool = key(False, "Attention by the flash-attn library (bf16 on a GPU).")
    apex: bool = key(
        False, "Add up weight gradients in NVIDIA apex's fused product (bf16 on a GPU): one pass less for each."
    )
    fp8: bool = key(
        False, "FP8 products by Transformer Engine. Always refused for now: it could not be proven without a GPU."
    )
