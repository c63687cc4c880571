"""Sliding windows that some layers have and others not, as `config.json` says it: Qwen's way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron.model.families.reading import check_kinds, default, refuse

if TYPE_CHECKING:
    from megatron.model.config import ModelConfig

_FULL, _SLIDING = "full_attention", "sliding_attention"


def window_fields(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """`sliding_window` and `full_attention_layers` of a model of so many layers; a longer list of `layer_types` is that
    of a model from which layers were left out. Raises ConfigError."""
    check_kinds(config, numbers=("sliding_window", "max_window_layers"), truths=("use_sliding_window",))
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    kinds = config.get("layer_types")
    if kinds is None:
        first = int(default(config, "max_window_layers", 28))
        kinds = [_SLIDING if window is not None and layer >= first else _FULL for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) < layers or any(kind not in (_FULL, _SLIDING) for kind in kinds):
        refuse([f"layer_types={kinds!r} (only {_FULL} or {_SLIDING} for each of {layers} layers)"])
    full = tuple(layer for layer in range(layers) if kinds[layer] == _FULL)
    if window is None and len(full) < layers:
        refuse(
            [f"layer_types with {_SLIDING} but no window: set use_sliding_window and sliding_window, or no such layer"]
        )
    if len(full) == layers:
        return {"sliding_window": None, "full_attention_layers": ()}
    assert window is not None
    return {"sliding_window": int(window), "full_attention_layers": full}


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `window_fields`, for readers that know only that the first layers have no window as well."""
    if config.sliding_window is None:
        return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_hidden_layers}
    kinds = [_FULL if layer in config.full_attention_layers else _SLIDING for layer in range(config.num_hidden_layers)]
    return {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "max_window_layers": len(config.full_attention_layers),
        "layer_types": kinds,
    }
