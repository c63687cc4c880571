"""Qwen2 and Qwen2.5 (Yang et al., 2024): Llama's layout, with biases of queries, keys and values, and a sliding window
in some layers where asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron.model.families.llama import LLAMA, decoder_fields, spell_decoder, write_decoder
from megatron.model.families.windows import window_fields, write_windows

if TYPE_CHECKING:
    from megatron.model.config import ModelConfig

# transformers' own, for files that leave these out
_DEFAULTS = {"num_key_value_heads": 32, "head_dim": None, "max_position_embeddings": 32768}


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = decoder_fields(config, "Qwen2", _DEFAULTS)
    return {**fields, **window_fields(config, fields["num_hidden_layers"]), "query_key_value_bias": True}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_decoder(config), **write_windows(config), "bos_token_id": None}


def _spell(config: Mapping[str, Any]) -> dict[str, Any]:
    return spell_decoder(config, _DEFAULTS)


QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=_fields,
    write=_write,
    spell=_spell,
    own_defaults={"num_key_value_heads": None, "rope_theta": 1e6},
)
