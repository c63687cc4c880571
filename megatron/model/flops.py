"""How many floating-point operations a model costs: the convention is named wherever a figure is shown.

Convention "model FLOPs, causal" (Megatron-LM since 2025): matrix products of layers and output, half of the square of
attention, forward and backward, no embedding look-up, no recomputation.
"""

from __future__ import annotations

from megatron.model.config import ModelConfig


def model_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward per token, causal attention over sequences of this length."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * queries + 2 * keys) + 3 * config.hidden_size * config.intermediate_size
    products = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * queries * sequence_length
    return 6.0 * (products + attention)
