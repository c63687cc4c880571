"""The families of models that are built, by the `model_type` of their `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.model.families.falcon import FALCON
from megatron.model.families.family import Family
from megatron.model.families.gpt2 import GPT2
from megatron.model.families.gpt_neox import GPT_NEOX
from megatron.model.families.llama import LLAMA
from megatron.model.families.mistral import MISTRAL
from megatron.model.families.qwen2 import QWEN2
from megatron.model.families.qwen3 import QWEN3
from megatron.utils.errors import ConfigError

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, FALCON, GPT2, GPT_NEOX)}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`, Llama where it names none. Raises ConfigError for one that is not built."""
    model_type = config.get("model_type", LLAMA.model_type)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"config.json asks for what is not supported: model_type={model_type!r} (built are {', '.join(FAMILIES)})."
        )
    return FAMILIES[model_type]


def dropout_notice(config: Mapping[str, Any]) -> str | None:
    """What to say where a `config.json` asks for dropout, which models here train without.

    Dropout is no part of the function that a checkpoint computes, and its random masks would have to be the same on
    every grid.
    """
    dropouts = family_of(config).dropouts
    stated = {name: config.get(name, default) for name, default in dropouts.items()}
    listed = ", ".join(f"{name}={rate}" for name, rate in stated.items() if rate)
    return f"config.json asks for dropout ({listed}): training runs without" if listed else None
