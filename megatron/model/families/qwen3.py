"""Qwen3 (Qwen Team, 2025): Llama's layout with a norm of each query and each key, and heads of any size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron.model.families.llama import LLAMA, decoder_fields, spell_decoder, write_decoder
from megatron.model.families.reading import check_kinds
from megatron.model.families.windows import window_fields, write_windows

if TYPE_CHECKING:
    from megatron.model.config import ModelConfig

# transformers' own, for files that leave these out
_DEFAULTS = {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768}


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    check_kinds(config, numbers=(), truths=("attention_bias",))
    fields = decoder_fields(config, "Qwen3", _DEFAULTS)
    return {
        **fields,
        **window_fields(config, fields["num_hidden_layers"]),
        "query_key_norm": True,
        "query_key_value_bias": bool(config.get("attention_bias")),
        "attention_output_bias": bool(config.get("attention_bias")),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_decoder(config),
        **write_windows(config),
        "attention_bias": config.attention_output_bias,
        "bos_token_id": None,
    }


def _spell(config: Mapping[str, Any]) -> dict[str, Any]:
    return spell_decoder(config, _DEFAULTS)


QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    query_key_norms=("self_attn.q_norm", "self_attn.k_norm"),
    fields=_fields,
    write=_write,
    spell=_spell,
    own_defaults={"num_key_value_heads": None, "head_dim": None, "rope_theta": 1e6},
)
