"""The rotary angles of a model: which pairs of a head's elements are turned, how fast, and scaled in which way.

Each scaling makes the model take longer sequences than those it was pretrained on. All are as in transformers, whose
float32 is here max(float32, dtype).
"""

from __future__ import annotations

import math

import torch

from megatron.kernels.numerics import statistics_dtype
from megatron.kernels.rotary import angle_tables, rotary_frequencies
from megatron.model.config import ModelConfig
from megatron.model.families.scaling import RotaryScaling


def position_tables(
    config: ModelConfig, sequence_length: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the angles by which heads are turned at each position, [sequence_length, head_dim], in
    max(float32, dtype). Where positions are not rotary they are 1 and 0: heads stay as they are."""
    pairs = config.head_dim // 2
    if config.rope_theta is None:
        return angle_tables(sequence_length, torch.zeros(pairs, dtype=statistics_dtype(dtype), device=device))
    frequencies, factor = _frequencies(config, config.rope_theta, sequence_length, dtype, device)
    turned = len(frequencies)
    cos, sin = angle_tables(sequence_length, torch.nn.functional.pad(frequencies, (0, pairs - turned)))
    if factor != 1.0:
        both = torch.arange(config.head_dim, device=device) % pairs < turned
        cos, sin = torch.where(both, cos * factor, cos), sin * factor
    return cos, sin


def depends_on_length(config: ModelConfig, sequence_length: int) -> bool:
    """Whether angles at this length are others than those of shorter sequences."""
    scaling = config.rope_scaling
    longer = sequence_length > config.max_position_embeddings
    return scaling is not None and scaling.rope_type == "dynamic" and longer


def _frequencies(
    config: ModelConfig, theta: float, sequence_length: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, float]:
    """(frequencies of the pairs that are turned, factor of their cos and sin)"""
    scaling, turned = config.rope_scaling, config.rotary_dim
    if scaling is not None and scaling.rope_type == "dynamic":
        growth = max(sequence_length, config.max_position_embeddings) / config.max_position_embeddings
        theta *= (scaling.factor * growth - (scaling.factor - 1.0)) ** (turned / (turned - 2))
    plain = rotary_frequencies(turned, theta, dtype, device)
    if scaling is None or scaling.rope_type == "dynamic":
        return plain, 1.0
    if scaling.rope_type == "linear":
        return plain / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _by_wavelength(plain, scaling), 1.0
    return _by_rotations(plain, theta, turned, scaling), _attention_factor(scaling)


def _by_wavelength(plain: torch.Tensor, scaling: RotaryScaling) -> torch.Tensor:
    """Llama 3.1: long waves are stretched by the factor, short ones stay, those between change over smoothly."""
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None and high is not None and length is not None
    wavelength = 2 * math.pi / plain
    share = ((length / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - share) * plain / scaling.factor + share * plain


def _by_rotations(plain: torch.Tensor, theta: float, turned: int, scaling: RotaryScaling) -> torch.Tensor:
    """YaRN (Peng et al., 2023, section 3.2): pairs that turn often within the pretrained length stay, those that turn
    seldom are stretched, with a ramp between."""
    length = scaling.original_max_position_embeddings
    assert length is not None

    def pair_of(rotations: float) -> float:
        return turned * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(scaling.beta_fast or 32.0), pair_of(scaling.beta_slow or 1.0)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, turned - 1)
    if first == last:
        last += 0.001
    place = torch.arange(len(plain), dtype=plain.dtype, device=plain.device)
    stretched = ((place - first) / (last - first)).clamp(0.0, 1.0)
    return plain / scaling.factor * stretched + plain * (1.0 - stretched)


def _attention_factor(scaling: RotaryScaling) -> float:
    """YaRN's factor of cos and sin (section 3.4), which sharpens attention over longer sequences."""

    def growth(weight: float) -> float:
        return 1.0 if scaling.factor <= 1.0 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return growth(scaling.mscale) / growth(scaling.mscale_all_dim)
    return growth(1.0)
