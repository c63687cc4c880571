"""Attention by flash-attn (Dao, 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron.kernels.attention import Attend, causal_attention
from megatron.kernels.vendor.comparison import Result, require_agreement
from megatron.kernels.vendor.library import Place, import_library, require_version
from megatron.utils.errors import ConfigError

KEY = "kernels.flash_attention"
CURE = f"install flash-attn 2.4.1 or newer (pip install flash-attn --no-build-isolation), or use {KEY}=false"
# From 2.4.1 on a deterministic backward pass can be asked for; 3 and later are other packages with other functions.
_LOWEST, _BELOW = (2, 4, 1), (3,)
_LARGEST_HEAD, _HEAD_MULTIPLE = 256, 8


def load(place: Place, heads: int, key_value_heads: int, head_dim: int) -> tuple[Attend, str]:
    """(attention for one rank's heads in bf16, a clause that describes it).

    Raises ConfigError where library, GPU or heads do not fit, or the numbers are not those of the reference.
    """
    place.require(KEY, (8, 0))
    if head_dim > _LARGEST_HEAD or head_dim % _HEAD_MULTIPLE:
        raise ConfigError(
            f"{KEY}=true, but heads of size {head_dim}: flash-attn takes multiples of {_HEAD_MULTIPLE} up to "
            f"{_LARGEST_HEAD}; use {KEY}=false"
        )
    module = import_library("flash_attn", KEY, CURE)
    version = require_version(module, KEY, _LOWEST, _BELOW, CURE)
    attend = adapt(module.flash_attn_func)
    errors = require_agreement(KEY, compare(attend, place.device, heads, key_value_heads, head_dim))
    return attend, f"flash-attn {version} ({errors})"


def adapt(flash_attn_func: Callable[..., Any]) -> Attend:
    """The library's function, which takes [b, s, heads, d], in our order of dims."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        mixed = flash_attn_func(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return mixed.transpose(1, 2)

    return attend


def compare(attend: Attend, device: torch.device, heads: int, key_value_heads: int, head_dim: int) -> list[Result]:
    """The output and the three gradients, of the adapter, of the reference and in float64."""
    length = 300  # no multiple of any block
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(2, count, length, head_dim) for count in (heads, key_value_heads, key_value_heads, heads)]
    *inputs, upstream = (torch.randn(shape, generator=generator, device=device).to(torch.bfloat16) for shape in shapes)

    def run(function: Attend, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        output = function(*leaves)
        if output.shape != upstream.shape:
            raise ConfigError(
                f"{KEY}=true is refused: the library's output has the shape {tuple(output.shape)}, not "
                f"{tuple(upstream.shape)}; use {KEY}=false, or another version of the library"
            )
        output = output.to(dtype)
        return output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))

    names = ("output", "gradient of the query", "gradient of the key", "gradient of the value")
    sides = [run(attend, torch.bfloat16), run(causal_attention, torch.bfloat16), run(causal_attention, torch.float64)]
    return list(zip(names, *sides, strict=True))
