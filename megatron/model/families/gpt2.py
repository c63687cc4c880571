"""GPT-2 and GPT-3 (Radford et al., 2019; Brown et al., 2020): learned positions, LayerNorm, GELU, biases everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron.model.families.family import Family, one_after_another
from megatron.model.families.reading import (
    ACTIVATIONS,
    check_kinds,
    default,
    head_size,
    refuse,
    refuse_activation,
    refuse_quantized,
    require,
)

if TYPE_CHECKING:
    from megatron.model.config import ModelConfig

_REQUIRED = ("vocab_size", "n_embd", "n_layer", "n_head")
_LONGEST = 1024
# What attention does besides, and the value under which it is what is built here.
_ATTENTION = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    check_kinds(
        config,
        numbers=(*_REQUIRED, "n_inner", "n_positions", "layer_norm_epsilon", "initializer_range"),
        truths=("tie_word_embeddings", *_ATTENTION),
    )
    refuse(_other_functions(config))
    require(config, _REQUIRED, "GPT-2")
    hidden = int(config["n_embd"])
    return {
        "vocab_size": int(config["vocab_size"]),
        "hidden_size": hidden,
        "intermediate_size": int(config.get("n_inner") or 4 * hidden),
        "num_hidden_layers": int(config["n_layer"]),
        "num_attention_heads": int(config["n_head"]),
        "num_key_value_heads": int(config["n_head"]),
        "head_dim": head_size(config, "n_embd", "n_head"),
        "max_position_embeddings": int(config.get("n_positions") or _LONGEST),
        "layer_norm_eps": float(default(config, "layer_norm_epsilon", 1e-5)),
        "rms_norm_eps": None,
        "rope_theta": None,
        "tie_word_embeddings": bool(default(config, "tie_word_embeddings", True)),
        "initializer_range": float(default(config, "initializer_range", 0.02)),
        "hidden_act": ACTIVATIONS[config.get("activation_function") or "gelu_new"],
        "query_key_value_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    }


def _other_functions(config: Mapping[str, Any]) -> Iterator[str]:
    yield from refuse_activation(config, "activation_function", "gelu_new", ("gelu", "gelu_new"))
    for name, built in _ATTENTION.items():
        if default(config, name, built) != built:
            yield f"{name}={config[name]} (only {built})"
    yield from refuse_quantized(config)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_positions": config.max_position_embeddings,
        "layer_norm_epsilon": config.layer_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "activation_function": config.hidden_act,
        **dict.fromkeys(GPT2.dropouts, 0.0),
        "bos_token_id": config.vocab_size - 1,  # GPT-2's <|endoftext|> is its last token
        "eos_token_id": config.vocab_size - 1,
        "use_cache": True,
    }


def _spell(config: Mapping[str, Any]) -> dict[str, Any]:
    """The number of positions under its older name as well, by which llama.cpp's converter finds it."""
    return {**config, "n_ctx": int(config.get("n_positions") or _LONGEST)}


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    embedding="transformer.wte",
    positions="transformer.wpe",
    layers="transformer.h",
    attention_norm="ln_1",
    query_key_value=one_after_another("attn.c_attn"),
    attention_output="attn.c_proj",
    feed_forward_norm="ln_2",
    feed_forward_input=("mlp.c_fc",),
    feed_forward_output="mlp.c_proj",
    final_norm="transformer.ln_f",
    head="lm_head",
    fields=_fields,
    write=_write,
    spell=_spell,
    transposed=True,
    prefix="transformer.",
    buffers=(".attn.bias", ".attn.masked_bias"),
    dropouts={"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    own_names={
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "layer_norm_eps": "layer_norm_epsilon",
        "hidden_act": "activation_function",
    },
)
