"""Llama (Touvron et al., 2023; Llama Team, 2024) and Code Llama: rotary positions, RMSNorm, SwiGLU, grouped keys and
values; biases where asked for. Families that follow its layout are made from it."""

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
    require,
    rotary_base,
)
from megatron.model.families.scaling import rotary_scaling, scaling_problems, spell_rotary
from megatron.utils.errors import ConfigError

if TYPE_CHECKING:
    from megatron.model.config import ModelConfig

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "initializer_range",
)
# transformers' own, for files that leave these out
_DEFAULTS = {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048}


def decoder_fields(config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model of Llama's layout without biases; `defaults` are those of `_DEFAULTS`' names in the family
    called `name`."""
    check_kinds(
        config,
        numbers=(*_REQUIRED, *_OPTIONAL),
        truths=("tie_word_embeddings",),
        tables=("rope_parameters", "rope_scaling"),
    )
    refuse(_other_functions(config))
    require(config, _REQUIRED, name)
    heads = int(config["num_attention_heads"])
    stated = {**defaults, **config}
    if stated["head_dim"] is None and int(config["hidden_size"]) % max(heads, 1):
        raise ConfigError(
            f"hidden_size={config['hidden_size']} is not divisible by num_attention_heads={heads}; "
            "set head_dim if the heads are of another size."
        )
    longest = int(stated["max_position_embeddings"] or defaults["max_position_embeddings"])
    return {
        "vocab_size": int(config["vocab_size"]),
        "hidden_size": int(config["hidden_size"]),
        "intermediate_size": int(config["intermediate_size"]),
        "num_hidden_layers": int(config["num_hidden_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(stated["num_key_value_heads"] or heads),
        "head_dim": int(stated["head_dim"] or head_size(config, "hidden_size", "num_attention_heads")),
        "max_position_embeddings": longest,
        "rms_norm_eps": float(default(config, "rms_norm_eps", 1e-6)),
        "rope_theta": rotary_base(config),
        "rope_scaling": rotary_scaling(config, longest),
        "tie_word_embeddings": bool(default(config, "tie_word_embeddings", False)),
        "initializer_range": float(default(config, "initializer_range", 0.02)),
    }


def _other_functions(config: Mapping[str, Any]) -> Iterator[str]:
    """Every setting under which this would not be the function of a plain Llama."""
    yield from refuse_activation(config, "hidden_act", "silu", ("silu",))
    yield from scaling_problems(config)
    for table in (config, config.get("rope_parameters") or {}, config.get("rope_scaling") or {}):
        if table.get("partial_rotary_factor", 1.0) not in (None, 1.0):
            yield f"partial_rotary_factor={table['partial_rotary_factor']} (every element is turned)"
    yield from refuse_quantized(config)


def write_decoder(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `decoder_fields`."""
    return {
        "model_type": config.model_type,
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
        **spell_rotary({}, config.rope_theta or 0.0, config.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
    }


def spell_decoder(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary angles as transformers 4 and 5 each spell them: who finds only the other's takes defaults, silently."""
    theta = rotary_base(config)
    longest = int(default(config, "max_position_embeddings", defaults["max_position_embeddings"]))
    return {**config, "rope_theta": theta, **spell_rotary(config, theta, rotary_scaling(config, longest))}


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    check_kinds(config, numbers=(), truths=("attention_bias", "mlp_bias"))
    attention_bias = bool(config.get("attention_bias"))
    return {
        **decoder_fields(config, "Llama", _DEFAULTS),
        "query_key_value_bias": attention_bias,
        "attention_output_bias": attention_bias,
        "mlp_bias": bool(config.get("mlp_bias")),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(config),
        "attention_bias": config.query_key_value_bias,
        "mlp_bias": config.mlp_bias,
        "pretraining_tp": 1,
    }


def _spell(config: Mapping[str, Any]) -> dict[str, Any]:
    return spell_decoder(config, _DEFAULTS)


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
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
