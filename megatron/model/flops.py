"""How many floating-point operations a model costs: the convention is named wherever a figure is shown.

Convention "model FLOPs, causal" (Megatron-LM since 2025): matrix products of layers and output, half of the square of
attention, forward and backward, no embedding look-up, no recomputation.
"""

from __future__ import annotations

from megatron.model.config import ModelConfig


def model_flops_per_token(config: ModelConfig, sequence_length: int, *, causal: bool = True) -> float:
    """FLOPs of forward and backward per token over sequences of this length; attention's square whole or, causal, half
    of it."""
    layers = config.num_hidden_layers * _layer_flops(config, sequence_length, causal)
    return 3.0 * (layers + _head_flops(config))


def head_cost_in_layers(config: ModelConfig, sequence_length: int) -> float:
    """How many layers cost as much as the output product."""
    return _head_flops(config) / _layer_flops(config, sequence_length, causal=True)


def _layer_flops(config: ModelConfig, sequence_length: int, causal: bool) -> float:
    """Forward, per token."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    feed_forward = (3 if config.is_gated else 2) * config.hidden_size * config.intermediate_size
    weights = config.hidden_size * (2 * queries + 2 * keys) + feed_forward
    return 2.0 * weights + (2.0 if causal else 4.0) * queries * sequence_length


def _head_flops(config: ModelConfig) -> float:
    """Forward, per token."""
    return 2.0 * config.vocab_size * config.hidden_size
