"""How a `config.json` scales rotary angles for sequences longer than those of pretraining, and how that is written.

transformers 4 keeps it in `rope_scaling`, transformers 5 in `rope_parameters`; the kind is `rope_type`, before that
`type`. What the kinds compute is `megatron.model.angles`' part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from megatron.utils.errors import ConfigError

Kind = Literal["linear", "dynamic", "llama3", "yarn"]

_KINDS: tuple[str, ...] = get_args(Kind)
_LARGEST = 2.0**53  # up to which every whole number is a float
_PLACES = ("rope_scaling", "rope_parameters")
# Of each kind: what must be there, and what may be. All are numbers but `truncate`.
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_OPTIONAL = {
    "linear": (),
    "dynamic": (),
    "llama3": ("original_max_position_embeddings",),
    "yarn": (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
# What stands beside the parameters of a kind: read elsewhere, or a remark.
_BESIDE = ("type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned")
_KNOWN = {name for names in (*_NEEDED.values(), *_OPTIONAL.values(), _BESIDE) for name in names} - {"finetuned"}
_TRUNCATED = ("truncate", True)  # need not be said


@dataclass(frozen=True)
class RotaryScaling:
    """One scaling of rotary angles, with the names of `config.json`. None: the kind has no use for it, or its own rule
    gives the value."""

    rope_type: Kind
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def scaling_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Why the scaling that is asked for could not be computed here; nothing where there is none, or it can."""
    for place in _PLACES:
        if any(isinstance(value, Mapping) for value in (config.get(place) or {}).values()):
            yield f"{place} by kinds of layers (only one for all layers)"
    for place, table in _stated(config).items():
        kind = _kind(table)
        if kind == "default":
            continue
        if kind not in _KINDS:
            yield f"{place} of type {kind!r} (built are default, {', '.join(_KINDS)})"
            continue
        known = (*_NEEDED[kind], *_OPTIONAL[kind], *_BESIDE)
        for name, value in table.items():
            if name not in known and value is not None:
                yield f"{place}.{name}={value!r} (no part of type {kind!r}: remove it if it is of no use)"
        yield from _value_problems(config, place, kind, table)


def rotary_scaling(config: Mapping[str, Any], max_position_embeddings: int) -> RotaryScaling | None:
    """The scaling of a `config.json` without `scaling_problems`, None where angles are not scaled. The model's
    `max_position_embeddings` stands for what the file leaves out, as in transformers.

    Raises ConfigError where two places contradict each other.
    """
    read = {place: _read(config, table, max_position_embeddings) for place, table in _stated(config).items()}
    if len(set(read.values())) > 1:
        listed = " but ".join(f"{place}={dict(config[place])}" for place in read)
        raise ConfigError(f"config.json contradicts itself: {listed}; remove the wrong one.")
    return next(iter(read.values()), None)


def spell_rotary(
    config: Mapping[str, Any], theta: float, scaling: RotaryScaling | None, turned_part: float | None = None
) -> dict[str, Any]:
    """`rope_scaling` and `rope_parameters`, as transformers 4 and 5 each find the base, the scaling and, where it is
    stated, the part of a head that is turned."""
    kept = {name: value for name, value in (config.get("rope_parameters") or {}).items() if name not in _KNOWN}
    parameters: dict[str, Any] = {**kept, "rope_type": "default", "rope_theta": theta}
    older = None
    if scaling is not None:
        names = (*_NEEDED[scaling.rope_type], *_OPTIONAL[scaling.rope_type])
        numbers = {name: getattr(scaling, name) for name in names}
        numbers = {name: value for name, value in numbers.items() if value is not None and (name, value) != _TRUNCATED}
        parameters |= {"rope_type": scaling.rope_type, **numbers}
        # the releases that know these two alone want exactly `type` and `factor`; later ones read either name
        name = "type" if scaling.rope_type in ("linear", "dynamic") else "rope_type"
        older = {name: scaling.rope_type, **numbers}
    if turned_part is not None:
        parameters["partial_rotary_factor"] = turned_part
    return {"rope_scaling": older, "rope_parameters": parameters}


def _stated(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The places that say what kind it is, and what they say."""
    tables = {place: config.get(place) or {} for place in _PLACES}
    return {place: table for place, table in tables.items() if "rope_type" in table or "type" in table}


def _kind(table: Mapping[str, Any]) -> Any:
    return table.get("rope_type") or table.get("type") or "default"


def _value_problems(config: Mapping[str, Any], place: str, kind: str, table: Mapping[str, Any]) -> Iterator[str]:
    for name in _NEEDED[kind]:
        if table.get(name) is None and not (kind == "yarn" and _pretrained_length(config, table)):
            yield f"{place} of type {kind!r} without {name}"
    for name in (*_NEEDED[kind], *_OPTIONAL[kind]):
        value = table.get(name)
        wanted = (bool,) if name == "truncate" else (int, float)
        if value is not None and (type(value) not in wanted or not (name == "truncate" or 0 < value < _LARGEST)):
            yield f"{place}.{name}={value!r} (only {'true or false' if name == 'truncate' else 'a positive number'})"
            return
    low, high = table.get("low_freq_factor"), table.get("high_freq_factor")
    if low is not None and high is not None and high <= low:
        yield f"{place}.high_freq_factor={high} (only above low_freq_factor={low})"
    outer, inner = (source.get("original_max_position_embeddings") for source in (config, table))
    if _OPTIONAL[kind] and outer is not None and inner is not None and outer != inner:
        yield f"{place}.original_max_position_embeddings={inner} beside original_max_position_embeddings={outer}"


def _pretrained_length(config: Mapping[str, Any], table: Mapping[str, Any]) -> Any:
    """The length before scaling: one stated beside the other sizes goes first in transformers."""
    return config.get("original_max_position_embeddings") or table.get("original_max_position_embeddings")


def _read(config: Mapping[str, Any], table: Mapping[str, Any], max_position_embeddings: int) -> RotaryScaling | None:
    kind = _kind(table)
    if kind == "default":
        return None
    names = (*_NEEDED[kind], *_OPTIONAL[kind])
    values: dict[str, Any] = {name: table[name] for name in names if table.get(name) is not None}
    if _OPTIONAL[kind]:
        length = int(_pretrained_length(config, table) or max_position_embeddings)
        values["original_max_position_embeddings"] = length
        values.setdefault("factor", max_position_embeddings / length)
    return RotaryScaling(kind, **{**values, "factor": float(values["factor"])})
