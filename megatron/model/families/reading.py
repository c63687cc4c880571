"""What reading any family's `config.json` needs: refusals that come all at once, and the rotary base's spellings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron.utils.errors import ConfigError

# Names of activations in `config.json` → the function, by one of its names. The tanh approximation has several.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
}


# What need not be whole among the numbers.
_REAL = frozenset(
    {
        "rms_norm_eps",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "rope_theta",
        "rotary_emb_base",
        "rotary_pct",
        "initializer_range",
    }
)
_LARGEST = 2.0**53  # up to which every whole number is a float


def check_kinds(
    config: Mapping[str, Any], *, numbers: Iterable[str], truths: Iterable[str] = (), tables: Iterable[str] = ()
) -> None:
    """Raise ConfigError, naming every value that is not of the kind that its name asks for."""
    numbers = tuple(numbers)
    kinds: dict[str, tuple[type, ...]] = dict.fromkeys(numbers, (int, float))
    kinds |= dict.fromkeys(truths, (bool,)) | dict.fromkeys(tables, (dict,))
    wrong = [
        f"{name}={config[name]!r}"
        for name, kind in kinds.items()
        if config.get(name) is not None and type(config[name]) not in kind
    ]
    wrong += [
        f"{name}={str(config[name])[:40]}"
        for name in numbers
        if type(config.get(name)) in (int, float) and not _is_sound(config[name], name in _REAL)
    ]
    if wrong:
        raise ConfigError(f"config.json holds values of the wrong kind: {', '.join(wrong)}.")


def _is_sound(number: float, real: bool) -> bool:
    return -_LARGEST <= number <= _LARGEST and (real or number == int(number))


def refuse(problems: Iterable[str]) -> None:
    """Raise ConfigError for the settings under which this would be another function than is built."""
    listed = "; ".join(problems)
    if listed:
        raise ConfigError(f"config.json asks for what is not supported: {listed}.")


def refuse_activation(config: Mapping[str, Any], name: str, default: str, built: tuple[str, ...]) -> Iterable[str]:
    """A problem where the activation is none of those built."""
    stated = config.get(name) or default
    if ACTIVATIONS.get(stated) not in built:
        yield f"{name}={stated!r} (only {' and '.join(repr(one) for one in built)})"


def refuse_quantized(config: Mapping[str, Any]) -> Iterable[str]:
    """A problem where the weights are stored as codes."""
    if config.get("quantization_config"):
        yield "quantization_config (dequantize the model first)"


def require(config: Mapping[str, Any], names: Iterable[str], family: str) -> None:
    """Raise ConfigError, naming every size that is not stated."""
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}: a {family} model cannot be built without.")


def default(config: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The stated value, or transformers' default where there is none."""
    return otherwise if config.get(name) is None else config[name]


def head_size(config: Mapping[str, Any], hidden: str, heads: str) -> int:
    """Size of one head where only the hidden size (under the name `hidden`) tells it; raises ConfigError."""
    if int(config[hidden]) % max(int(config[heads]), 1):
        raise ConfigError(f"{hidden}={config[hidden]} is not divisible by {heads}={config[heads]}.")
    return int(config[hidden]) // max(int(config[heads]), 1)


def rotary_base(config: Mapping[str, Any], older: str = "rope_theta") -> float:
    """The rotary base: transformers 4 writes it under `older`, transformers 5 as `rope_parameters.rope_theta`.

    transformers also reads one inside `rope_scaling`. Raises ConfigError where they differ.
    """
    stated = {older: config.get(older), "rope_theta": config.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        stated[f"{name}.rope_theta"] = (config.get(name) or {}).get("rope_theta")
    found = {name: base for name, base in stated.items() if base is not None}
    wrong = [f"{name}={str(base)[:40]}" for name, base in found.items() if not _is_base(base)]
    if wrong:
        raise ConfigError(f"config.json holds a rotary base that is no positive number: {', '.join(wrong)}.")
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name}={base}" for name, base in found.items())
        raise ConfigError(f"config.json contradicts itself: {listed}; remove the wrong one.")
    return float(next(iter(found.values()), 10000.0))


def _is_base(value: object) -> bool:
    return type(value) in (int, float) and isinstance(value, (int, float)) and 0 < value <= _LARGEST
