"""Llama (Touvron et al., 2023): rotary positions, RMSNorm, SwiGLU, grouped keys and values; biases where asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron.model.families.family import Family, apart
from megatron.model.families.reading import (
    check_kinds,
    default,
    head_size,
    refuse,
    refuse_activation,
    refuse_quantized,
    refuse_scaled_angles,
    require,
    rotary_base,
)
from megatron.utils.errors import ConfigError

if TYPE_CHECKING:
    from megatron.model.config import ModelConfig

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "initializer_range",
)


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    check_kinds(
        config,
        numbers=(*_REQUIRED, *_OPTIONAL),
        truths=("tie_word_embeddings", "attention_bias", "mlp_bias"),
        tables=("rope_parameters", "rope_scaling"),
    )
    refuse(_other_functions(config))
    require(config, _REQUIRED, "Llama")
    heads = int(config["num_attention_heads"])
    if config.get("head_dim") is None and int(config["hidden_size"]) % max(heads, 1):
        raise ConfigError(
            f"hidden_size={config['hidden_size']} is not divisible by num_attention_heads={heads}; "
            "set head_dim if the heads are of another size."
        )
    attention_bias = bool(config.get("attention_bias"))
    return {
        "vocab_size": int(config["vocab_size"]),
        "hidden_size": int(config["hidden_size"]),
        "intermediate_size": int(config["intermediate_size"]),
        "num_hidden_layers": int(config["num_hidden_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or head_size(config, "hidden_size", "num_attention_heads")),
        # transformers' own defaults for LlamaConfig, for files that leave these out
        "max_position_embeddings": int(config.get("max_position_embeddings") or 2048),
        "rms_norm_eps": float(default(config, "rms_norm_eps", 1e-6)),
        "rope_theta": rotary_base(config),
        "tie_word_embeddings": bool(default(config, "tie_word_embeddings", False)),
        "initializer_range": float(default(config, "initializer_range", 0.02)),
        "query_key_value_bias": attention_bias,
        "attention_output_bias": attention_bias,
        "mlp_bias": bool(config.get("mlp_bias")),
    }


def _other_functions(config: Mapping[str, Any]) -> Iterator[str]:
    """Every setting under which this would not be the function of a plain Llama."""
    yield from refuse_activation(config, "hidden_act", "silu", ("silu",))
    yield from refuse_scaled_angles(config)
    if (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial_rotary_factor (every element is turned)"
    yield from refuse_quantized(config)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_bias": config.query_key_value_bias,
        "mlp_bias": config.mlp_bias,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pretraining_tp": 1,
        "use_cache": True,
    }


def _spell(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary base as transformers 4 and 5 each spell it: who finds only the other's takes a default, silently."""
    theta = rotary_base(config)
    parameters = {**(config.get("rope_parameters") or {}), "rope_type": "default", "rope_theta": theta}
    return {**config, "rope_theta": theta, "rope_scaling": None, "rope_parameters": parameters}


LLAMA = Family(
    model_type="llama",
    embedding="model.embed_tokens",
    layers="model.layers",
    attention_norm="input_layernorm",
    query_key_value=apart("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_output="self_attn.o_proj",
    feed_forward_norm="post_attention_layernorm",
    feed_forward_input=("mlp.gate_proj", "mlp.up_proj"),
    feed_forward_output="mlp.down_proj",
    final_norm="model.norm",
    head="lm_head",
    fields=_fields,
    write=_write,
    spell=_spell,
    buffers=("rotary_emb.inv_freq",),
    dropouts={"attention_dropout": 0.0},
    required=_REQUIRED,
    own_defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
)
