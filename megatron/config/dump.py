"""A configuration as a dict, as YAML text, and what two of them differ in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron.config import yaml_text
from megatron.config.run import RunConfig
from megatron.config.schema import all_keys, sections
from megatron.config.values import show


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Sections of plain values (tuples become lists), as YAML or JSON can hold them."""
    return {
        section: {name: _plain(value) for name, value in dataclasses.asdict(getattr(config, section)).items()}
        for section in sections()
    }


def dump_config(config: RunConfig) -> str:
    """YAML text that loads as the same configuration again: every key, also those that have their default."""
    return yaml_text.dump(to_dict(config))


def differences(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each key that two configurations (as `to_dict` gives them) differ in: `train.steps: 100 -> 200`.

    A key that one side lacks, as an older release may, counts as its default.
    """
    before, after = _flatten(old), _flatten(new)
    defaults = {dotted: _plain(key.default) for dotted, key in all_keys().items()}
    names = [*after, *(name for name in before if name not in after)]
    pairs = [(name, *(side.get(name, defaults.get(name)) for side in (before, after))) for name in names]
    return [f"{name}: {show(first)} -> {show(second)}" for name, first, second in pairs if first != second]


def _flatten(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{name}": _plain(value) for section, keys in config.items() for name, value in keys.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
