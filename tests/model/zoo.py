"""Tiny models of transformers, one for each variation of each family that is built here."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .oracle import with_random_vectors

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": None,
}
GROUPED = {"intermediate_size": 56, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 20,
    "rope_theta": 5e5,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5}

MISTRAL: dict[str, dict[str, Any]] = {
    "no window": {"sliding_window": None},
    "window": {"sliding_window": 7},
    "window of two": {"sliding_window": 2, "num_key_value_heads": 4},
    "window as long as the sequence": {"sliding_window": 24},
    "heads of another size, tied": {"sliding_window": 5, "head_dim": 20, "tie_word_embeddings": True},
    "window, scaled angles": {"sliding_window": 9, "rope_parameters": YARN},
}
QWEN2: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "window in the later layers": {**WINDOWS, "max_window_layers": 1},
    "window in all layers": {**WINDOWS, "max_window_layers": 0},
    "window that no layer has": {**WINDOWS, "max_window_layers": 3},
    "window in some layers": {**WINDOWS, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "window that is not used": {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0},
    "scaled angles": {"rope_parameters": YARN},
}
QWEN3: dict[str, dict[str, Any]] = {
    "heads of hidden / heads": {"head_dim": 8},
    "heads of another size": {"head_dim": 20, "hidden_size": 36},
    "biases, tied": {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
    "one key/value head, large eps": {"head_dim": 8, "num_key_value_heads": 1, "rms_norm_eps": 1e-2},
    "window in the later layers": {"head_dim": 8, **WINDOWS, "max_window_layers": 2},
    "scaled angles": {"head_dim": 16, "rope_parameters": YARN},
}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "llama": (GROUPED, {"scaled angles": {"rope_parameters": LLAMA_3}}),
    "mistral": (GROUPED, MISTRAL),
    "qwen2": (GROUPED, QWEN2),
    "qwen3": (GROUPED, QWEN3),
}
ZOO = {
    f"{model_type}, {name}": (model_type, {**base, **fields})
    for model_type, (base, variations) in FAMILIES.items()
    for name, fields in variations.items()
}


def tiny(model_type: str, fields: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A model of random weights in float32, large enough that every part of it matters."""
    config = AutoConfig.for_model(model_type, **{**SIZES, **fields})
    torch.manual_seed(seed)
    return with_random_vectors(AutoModelForCausalLM.from_config(config).eval())
