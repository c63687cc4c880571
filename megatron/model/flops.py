"""How many floating-point operations a model costs: the convention is named wherever a figure is shown.

Convention "model FLOPs, causal" (Megatron-LM since 2025): matrix products of layers and output, half of the square of
attention (of which a sliding window leaves a band), forward and backward, no embedding look-up, no recomputation.
"""

from __future__ import annotations

from megatron.model.config import ModelConfig


def model_flops_per_token(
    config: ModelConfig, sequence_length: int, *, causal: bool = True, adapters: int | None = None
) -> float:
    """FLOPs of forward and backward per token over sequences of this length; attention's square whole or, causal, half
    of it. With so many weights of `adapters` these alone are trained: the model's own get no gradients."""
    windows = [config.window_of(layer) for layer in range(config.num_hidden_layers)]
    layers = sum(_layer_flops(config, sequence_length, causal, window) for window in windows)
    flops = 3.0 * (layers + _head_flops(config))
    if adapters is None:
        return flops
    products = config.num_hidden_layers * _layer_flops(config, 0, causal) + _head_flops(config)
    return flops - products + 6.0 * adapters


def head_cost_in_layers(config: ModelConfig, sequence_length: int) -> float:
    """How many layers cost as much as the output product."""
    return _head_flops(config) / _layer_flops(config, sequence_length, causal=True)


def _layer_flops(config: ModelConfig, sequence_length: int, causal: bool, window: int | None = None) -> float:
    """Forward, per token."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    feed_forward = (3 if config.is_gated else 2) * config.hidden_size * config.intermediate_size
    weights = config.hidden_size * (2 * queries + 2 * keys) + feed_forward
    keys_seen = sequence_length / 2.0 if causal else float(sequence_length)
    if causal and window is not None and window < sequence_length:
        keys_seen = window - window**2 / (2.0 * sequence_length)
    return 2.0 * weights + 4.0 * queries * keys_seen


def _head_flops(config: ModelConfig) -> float:
    """Forward, per token."""
    return 2.0 * config.vocab_size * config.hidden_size
