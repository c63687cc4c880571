"""Mistral (Jiang et al., 2023): Llama's layout, and a sliding window in every layer, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron.model.families.llama import LLAMA, decoder_fields, spell_decoder, write_decoder
from megatron.model.families.reading import check_kinds, refuse

if TYPE_CHECKING:
    from megatron.model.config import ModelConfig

# transformers' own, for files that leave these out
_DEFAULTS = {"num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072}
_WINDOW = 4096


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    check_kinds(config, numbers=("sliding_window",))
    if config.get("layer_types") is not None:
        refuse(["layer_types (all layers are alike: the family of these is not built)"])
    window = config.get("sliding_window", _WINDOW)
    return {
        **decoder_fields(config, "Mistral", _DEFAULTS),
        "sliding_window": None if window is None else int(window),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_decoder(config), "sliding_window": config.sliding_window}


def _spell(config: Mapping[str, Any]) -> dict[str, Any]:
    return spell_decoder(config, _DEFAULTS)


MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=_fields,
    write=_write,
    spell=_spell,
    own_defaults={"num_key_value_heads": None, "rms_norm_eps": 1e-5, "sliding_window": None},
)
