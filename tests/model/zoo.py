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
FALCON_40B = {"new_decoder_architecture": True, "num_kv_heads": 2}
REFINED_WEB = {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}
FALCON: dict[str, dict[str, Any]] = {
    "7B": {},
    "40B": FALCON_40B,
    "40B, a head of its own, wide": {**FALCON_40B, "tie_word_embeddings": False, "ffn_hidden_size": 50},
    "11B": {**FALCON_40B, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    "40B, as many keys as queries": {"new_decoder_architecture": True, "bias": True},
    "11B, one key/value head": {**FALCON_40B, "num_kv_heads": 1, "num_ln_in_parallel_attn": 1},
    "RefinedWeb": REFINED_WEB,
    "RefinedWeb, three heads, large eps": {
        **REFINED_WEB, "num_attention_heads": 3, "hidden_size": 24, "layer_norm_epsilon": 1e-2,
    },
    "RefinedWeb, twelve heads": {**REFINED_WEB, "num_attention_heads": 12, "hidden_size": 48},
    "7B with ALiBi": {"alibi": True, "activation": "gelu_new"},
    "one after the other, rotary, one key/value head": {"parallel_attn": False},
    "at once, as many keys as queries": {"multi_query": False, "bias": True},
    "40B, scaled angles": {**FALCON_40B, "rope_parameters": YARN},
}  # fmt: skip
# At once, a quarter turned: as published.
PYTHIA: dict[str, dict[str, Any]] = {
    "Pythia": {},
    "a quarter of heads of 12": {"hidden_size": 48},  # 3 elements are turned, which transformers takes as 4
    "at once, all turned": {"rotary_pct": 1.0},
    "one after the other, half turned, approximate gelu": {
        "use_parallel_residual": False, "rotary_pct": 0.5, "hidden_act": "gelu_fast",
    },
    "no biases in attention, tied": {"attention_bias": False, "tie_word_embeddings": True},
    "scaled angles": {
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 2e4, "partial_rotary_factor": 0.5}
    },
    "scaled angles and products": {"hidden_size": 64, "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
}  # fmt: skip
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "llama": (GROUPED, {"scaled angles": {"rope_parameters": LLAMA_3}}),
    "mistral": (GROUPED, MISTRAL),
    "qwen2": (GROUPED, QWEN2),
    "qwen3": (GROUPED, QWEN3),
    "falcon": ({}, FALCON),
    "gpt_neox": ({"intermediate_size": 56}, PYTHIA),
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
