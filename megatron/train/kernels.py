"""Which kernels a run uses: chosen once at the start, said in one line."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron.config.kernels import KernelsConfig
from megatron.kernels import native
from megatron.kernels.attention import compiled_causal_attention
from megatron.kernels.eager_attention import eager_causal_attention
from megatron.kernels.vendor.library import Place
from megatron.kernels.vendor.select import VendorKernels, load_vendor_kernels
from megatron.model.attention import Attention
from megatron.model.config import ModelConfig
from megatron.parallel.weight_gradient import sink_of
from megatron.parallel.world import World
from megatron.utils.device import compute_capability
from megatron.utils.logging import get_logger

_logger = get_logger("megatron.train")


def choose_kernels(config: KernelsConfig, model: ModelConfig, tensor: int, world: World) -> VendorKernels:
    """Have our operations use the backend that is asked for; returns what libraries contribute.

    Raises ConfigError, alike on all ranks, for what cannot be had.
    """
    device = world.device
    words = world.agree(lambda: native.select(config.backend, device.type))
    vendor = world.agree(
        lambda: load_vendor_kernels(
            config,
            Place(device, compute_capability(device)),
            heads=model.num_attention_heads // tensor,
            key_value_heads=max(1, model.num_key_value_heads // tensor),
            head_dim=model.head_dim,
        )
    )
    if vendor.attend is None and device.type == "cpu" and native.in_use("cpu"):
        vendor = replace(vendor, attend=compiled_causal_attention)
    if config.attention == "eager":
        words += "; eager attention, which keeps the probabilities of all pairs"
        vendor = replace(vendor, attend=eager_causal_attention)
    if world.launch.rank == 0:
        slower = config.backend == "auto" and not native.in_use(device.type)
        (_logger.warning if slower else _logger.info)("%s", "; ".join((words, *vendor.words)))
    return vendor


def install(vendor: VendorKernels, model: torch.nn.Module) -> None:
    """Have a model whose gradients go to buckets use what libraries contribute."""
    for module in model.modules():
        if isinstance(module, Attention) and vendor.attend is not None:
            module.attend = vendor.attend
    for parameter in model.parameters():
        sink = sink_of(parameter)
        if sink is not None and vendor.accumulate is not None:
            sink.accumulate = vendor.accumulate
