"""Falcon (Almazrouei et al., 2023): LayerNorm, GELU, few key/value heads, and three kinds of layers.

7B: attention and feed-forward at once behind one norm, one key/value head. 40B and 180B (`new_decoder_architecture`):
at once behind two norms, a few key/value heads; 11B: behind one. The RefinedWeb models: one after the other, ALiBi
instead of rotary positions, and biases.
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

_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_LONGEST = 2048


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("n_embed") is not None:
        config = {**config, "hidden_size": config["n_embed"]}  # its older name goes first in transformers
    check_kinds(
        config,
        numbers=(
            *_REQUIRED,
            "num_kv_heads",
            "num_ln_in_parallel_attn",
            "ffn_hidden_size",
            "max_position_embeddings",
            "original_max_position_embeddings",
            "layer_norm_epsilon",
            "rope_theta",
            "initializer_range",
        ),
        truths=("alibi", "bias", "multi_query", "new_decoder_architecture", "parallel_attn", "tie_word_embeddings"),
        tables=("rope_parameters", "rope_scaling"),
    )
    refuse(_other_functions(config))
    require(config, _REQUIRED, "Falcon")
    hidden, bias, alibi = int(config["hidden_size"]), bool(config.get("bias")), bool(config.get("alibi"))
    longest = int(default(config, "max_position_embeddings", _LONGEST))
    return {
        "vocab_size": int(config["vocab_size"]),
        "hidden_size": hidden,
        "intermediate_size": int(default(config, "ffn_hidden_size", 4 * hidden)),
        "num_hidden_layers": int(config["num_hidden_layers"]),
        "num_attention_heads": int(config["num_attention_heads"]),
        "num_key_value_heads": _key_value_heads(config),
        "head_dim": head_size(config, "hidden_size", "num_attention_heads"),
        "max_position_embeddings": longest,
        "layer_norm_eps": float(default(config, "layer_norm_epsilon", 1e-5)),
        "rms_norm_eps": None,
        "rope_theta": None if alibi else rotary_base(config),
        "rope_scaling": None if alibi else rotary_scaling(config, longest),
        "alibi": alibi,
        "parallel_norms": _parallel_norms(config),
        "tie_word_embeddings": bool(default(config, "tie_word_embeddings", True)),
        "initializer_range": float(default(config, "initializer_range", 0.02)),
        "hidden_act": ACTIVATIONS[config.get("activation") or "gelu"],
        "query_key_value_bias": bias,
        "attention_output_bias": bias,
        "mlp_bias": bias,
    }


def _is_new(config: Mapping[str, Any]) -> bool:
    return bool(config.get("new_decoder_architecture"))


def _parallel_norms(config: Mapping[str, Any]) -> int | None:
    if _is_new(config):
        return int(default(config, "num_ln_in_parallel_attn", 2))
    return 1 if default(config, "parallel_attn", True) else None


def _key_value_heads(config: Mapping[str, Any]) -> int:
    if not _is_new(config) and default(config, "multi_query", True):
        return 1
    return int(default(config, "num_kv_heads", config["num_attention_heads"]))


def _other_functions(config: Mapping[str, Any]) -> Iterator[str]:
    """What is not built; and combinations for which transformers has no layers."""
    yield from refuse_activation(config, "activation", "gelu", ("gelu", "gelu_new"))
    yield from scaling_problems(config)
    if (config.get("rope_parameters") or {}).get("partial_rotary_factor") not in (None, 1.0):
        yield f"partial_rotary_factor={config['rope_parameters']['partial_rotary_factor']} (every element is turned)"
    norms, parallel, new = (
        config.get("num_ln_in_parallel_attn"),
        default(config, "parallel_attn", True),
        _is_new(config),
    )
    if new and not parallel:
        yield "parallel_attn=false with new_decoder_architecture=true (such layers are always parallel: leave it out)"
    if norms not in ((None, 1, 2) if new or not parallel else (None, 1)):
        yield f"num_ln_in_parallel_attn={norms} (only 1 or, with new_decoder_architecture=true, 2)"
    heads = config.get("num_attention_heads")
    if not new and not default(config, "multi_query", True) and config.get("num_kv_heads") not in (None, heads):
        yield f"num_kv_heads={config['num_kv_heads']} with multi_query=false (only num_attention_heads={heads})"
    yield from refuse_quantized(config)


def _write(config: ModelConfig) -> dict[str, Any]:
    alike = config.num_key_value_heads in (1, config.num_attention_heads)
    new = config.parallel_norms == 2 or not alike
    rotary = {} if config.rope_theta is None else spell_rotary({}, config.rope_theta, config.rope_scaling)
    return {
        "model_type": "falcon",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "multi_query": config.num_key_value_heads == 1,
        "new_decoder_architecture": new,
        "parallel_attn": config.parallel_norms is not None,
        "num_ln_in_parallel_attn": config.parallel_norms if new else None,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_epsilon": config.layer_norm_eps,
        "alibi": config.alibi,
        "rope_theta": config.rope_theta or 10000.0,
        **rotary,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "activation": config.hidden_act,
        "bias": config.mlp_bias,
        **dict.fromkeys(FALCON.dropouts, 0.0),
        "bos_token_id": 11,
        "eos_token_id": 11,
        "use_cache": True,
    }


def _spell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary angles as transformers 4 and 5 each spell them, and how many key/value heads there are: with `multi_query`
    transformers does not look, and llama.cpp's converter at nothing else."""
    config = {**config, "num_kv_heads": _key_value_heads(config)}
    if config.get("alibi"):
        return config
    theta = rotary_base(config)
    scaling = rotary_scaling(config, int(default(config, "max_position_embeddings", _LONGEST)))
    return {**config, "rope_theta": theta, **spell_rotary(config, theta, scaling)}


FALCON = Family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    embedding="transformer.word_embeddings",
    layers="transformer.h",
    attention_norm="input_layernorm",
    query_key_value=group_by_group("self_attention.query_key_value"),
    attention_output="self_attention.dense",
    feed_forward_norm="post_attention_layernorm",
    parallel_norms=("ln_attn", "ln_mlp"),
    feed_forward_input=("mlp.dense_h_to_4h",),
    feed_forward_output="mlp.dense_4h_to_h",
    final_norm="transformer.ln_f",
    head="lm_head",
    fields=_fields,
    write=_write,
    spell=_spell,
    prefix="transformer.",
    buffers=("rotary_emb.inv_freq",),
    dropouts={"attention_dropout": 0.0, "hidden_dropout": 0.0},
    required=_REQUIRED,
    own_names={
        "intermediate_size": "ffn_hidden_size",
        "num_key_value_heads": "num_kv_heads",
        "layer_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation",
    },
    own_defaults={"new_decoder_architecture": True},
)
