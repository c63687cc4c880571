"""GPT-NeoX and Pythia (Black et al., 2022): LayerNorm, GELU, biases everywhere, rotary positions.

The published models turn a quarter of each head and add attention and feed-forward to the residual stream at once. One
made here at random does neither, as the GPT of Megatron-LM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron.model.families.family import Family, group_by_group
from megatron.model.families.reading import (
    ACTIVATIONS,
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

if TYPE_CHECKING:
    from megatron.model.config import ModelConfig

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    check_kinds(
        config,
        numbers=(
            *_REQUIRED,
            "max_position_embeddings",
            "original_max_position_embeddings",
            "layer_norm_eps",
            "rotary_pct",
            "rotary_emb_base",
            "initializer_range",
        ),
        truths=("tie_word_embeddings", "attention_bias", "use_parallel_residual"),
        tables=("rope_parameters", "rope_scaling"),
    )
    refuse(_other_functions(config))
    require(config, _REQUIRED, "GPT-NeoX")
    attention_bias = bool(default(config, "attention_bias", True))
    longest = int(default(config, "max_position_embeddings", 2048))
    return {
        "vocab_size": int(config["vocab_size"]),
        "hidden_size": int(config["hidden_size"]),
        "intermediate_size": int(config["intermediate_size"]),
        "num_hidden_layers": int(config["num_hidden_layers"]),
        "num_attention_heads": int(config["num_attention_heads"]),
        "num_key_value_heads": int(config["num_attention_heads"]),
        "head_dim": head_size(config, "hidden_size", "num_attention_heads"),
        "max_position_embeddings": longest,
        "layer_norm_eps": float(default(config, "layer_norm_eps", 1e-5)),
        "rms_norm_eps": None,
        "rope_theta": rotary_base(config, "rotary_emb_base"),
        "rope_scaling": rotary_scaling(config, longest),
        "partial_rotary_factor": _turned(config),
        "parallel_norms": 2 if default(config, "use_parallel_residual", True) else None,
        "tie_word_embeddings": bool(default(config, "tie_word_embeddings", False)),
        "initializer_range": float(default(config, "initializer_range", 0.02)),
        "hidden_act": ACTIVATIONS[config.get("hidden_act") or "gelu"],
        "query_key_value_bias": attention_bias,
        "attention_output_bias": attention_bias,
        "mlp_bias": True,
    }


def _turned(config: Mapping[str, Any]) -> float:
    """The part of each head that is turned, as transformers finds it: its default is a quarter."""
    for name in ("rope_parameters", "rope_scaling"):
        stated = (config.get(name) or {}).get("partial_rotary_factor")
        if stated is not None:
            return float(stated)
    return float(default(config, "rotary_pct", 0.25))


def _other_functions(config: Mapping[str, Any]) -> Iterator[str]:
    yield from refuse_activation(config, "hidden_act", "gelu", ("gelu", "gelu_new"))
    yield from scaling_problems(config)
    yield from refuse_quantized(config)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_eps": config.layer_norm_eps,
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": config.partial_rotary_factor,
        **spell_rotary({}, config.rope_theta or 0.0, config.rope_scaling, config.partial_rotary_factor),
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": config.hidden_act,
        "attention_bias": config.query_key_value_bias,
        "use_parallel_residual": config.parallel_norms is not None,
        **dict.fromkeys(GPT_NEOX.dropouts, 0.0),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": True,
    }


def _spell(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is turned, and from which base, as transformers 4 and 5 each spell it."""
    theta, turned = rotary_base(config, "rotary_emb_base"), _turned(config)
    scaling = rotary_scaling(config, int(default(config, "max_position_embeddings", 2048)))
    older = {"rotary_emb_base": theta, "rotary_pct": turned}
    return {**config, **older, **spell_rotary(config, theta, scaling, turned)}


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    embedding="gpt_neox.embed_in",
    layers="gpt_neox.layers",
    attention_norm="input_layernorm",
    query_key_value=group_by_group("attention.query_key_value"),
    attention_output="attention.dense",
    feed_forward_norm="post_attention_layernorm",
    feed_forward_input=("mlp.dense_h_to_4h",),
    feed_forward_output="mlp.dense_4h_to_h",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
    fields=_fields,
    write=_write,
    spell=_spell,
    prefix="gpt_neox.",
    buffers=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    dropouts={"attention_dropout": 0.0, "hidden_dropout": 0.0},
    required=_REQUIRED,
    own_defaults={"use_parallel_residual": False, "rotary_pct": 1.0},
)
