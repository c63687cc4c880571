"""From a value as YAML gives it to the exact type of a key, or a sentence that says what is wrong with it."""

from __future__ import annotations

import math
import types
import typing
from itertools import pairwise
from typing import Any, Literal

from megatron.config.batches import GlobalBatch
from megatron.config.data import Blend, BlendFrom, Source
from megatron.config.parallel import LayerSplit
from megatron.config.schema import Key, nearest_name


class ValueProblem(Exception):
    """What is wrong with a value; the text continues "section.name=value ..."."""


def convert(key: Key, value: Any) -> Any:
    """The value as the key's type: strict, except that `1e3` or `1000.0` is a whole number and 1 a real one.

    Raises ValueProblem where the type, the choice or the range is wrong.
    """
    optional, kind = split_optional(key.type)
    if value is None:
        if optional:
            return None
        raise ValueProblem(f"must not be null; the default is {show(key.default)}")
    converted = _convert_kind(kind, value)
    if isinstance(converted, (int, float)) and not isinstance(converted, bool):
        _check_range(key, converted)
    elif kind == GlobalBatch:
        for _, batch in converted:
            _check_range(key, batch)
    return converted


def takes_text(key: Key) -> bool:
    """Whether any single word is a legal value of the key, so that `--log.dir 2024` means the folder `2024`."""
    kind = split_optional(key.type)[1]
    return kind is str or kind == Source


def split_optional(annotation: Any) -> tuple[bool, Any]:
    """(whether None is allowed, the type without None)."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return False, annotation
    members = typing.get_args(annotation)
    rest = tuple(member for member in members if member is not types.NoneType)
    return len(rest) < len(members), rest[0] if len(rest) == 1 else typing.Union[rest]  # noqa: UP007 (a tuple)


def show(value: Any) -> str:
    """A value as YAML would spell it, in one line, for messages."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(show(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {show(item)}" for name, item in value.items()) + "}"
    return repr(value) if isinstance(value, str) and (not value or value != value.strip()) else str(value)


def _convert_kind(kind: Any, value: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        return _convert_choice(typing.get_args(kind), value)
    if kind == Source:
        return _convert_source(value)
    if kind == GlobalBatch:
        return _convert_global_batch(value)
    if kind == LayerSplit:
        return _convert_layer_split(value)
    if typing.get_origin(kind) is tuple:
        return _convert_choices(typing.get_args(typing.get_args(kind)[0]), value)
    return _CONVERTERS[kind](value)


def _convert_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueProblem("must be true or false")
    return value


def _convert_int(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueProblem("must be a whole number")
    return value


def _convert_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueProblem("must be a number")
    if not math.isfinite(value):
        raise ValueProblem("must be a finite number")
    return float(value)


def _convert_str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueProblem("must be text; in a file, put it in quotes")
    if not value.strip():
        raise ValueProblem("must not be empty; write null for none")
    if not value.isprintable():
        raise ValueProblem(f"holds characters that cannot be printed: {value!a}")
    return value


def _convert_choice(choices: tuple[Any, ...], value: Any) -> Any:
    if value in choices and isinstance(value, str):
        return value
    guess = nearest_name(str(value), choices)
    hint = f"; did you mean {guess}?" if guess else ""
    raise ValueProblem(f"must be one of {', '.join(choices)}{hint}")


def _convert_choices(choices: tuple[str, ...], value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueProblem(f"must be a list of some of {', '.join(choices)}")
    chosen = tuple(_convert_choice(choices, item) for item in value)
    if len(set(chosen)) < len(chosen):
        raise ValueProblem(f"names {next(one for one in chosen if chosen.count(one) > 1)} twice")
    return chosen


def _convert_source(value: Any) -> Source:
    if isinstance(value, str):
        return _convert_str(value)
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueProblem("must be a prefix or a list of [weight, prefix] pairs")
    if all(isinstance(entry, dict) for entry in value):
        stages = tuple(_convert_stage(entry) for entry in value)
        _check_ascending([stage.from_tokens for stage in stages], "from_tokens")
        return stages
    return _convert_blend(value)


def _convert_blend(value: Any) -> Blend:
    if isinstance(value, str):
        return ((1.0, _convert_str(value)),)
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueProblem(f"has the blend {show(value)}: a blend is a prefix or a list of [weight, prefix] pairs")
    if all(isinstance(entry, str) for entry in value):
        value = [(None, entry) for entry in value]
    pairs, problems = [], []
    for pair in value:
        try:
            pairs.append(_convert_pair(pair))
        except ValueProblem as problem:
            problems.append(str(problem))
    if problems:
        raise ValueProblem("; it ".join(dict.fromkeys(problems)))
    prefixes = [prefix for _, prefix in pairs]
    if len(set(prefixes)) < len(prefixes):
        twice = next(prefix for prefix in prefixes if prefixes.count(prefix) > 1)
        raise ValueProblem(f"names {twice} twice in a blend: give it once, with the sum of the weights")
    weighed = [weight is not None for weight, _ in pairs]
    if any(weighed) and not all(weighed):
        raise ValueProblem("gives some of its pairs a weight and others none: give all of them one, or none")
    return tuple(pairs)


def _convert_stage(entry: dict[str, Any]) -> BlendFrom:
    if set(entry) != {"from_tokens", "blend"}:
        raise ValueProblem(
            f"has the entry {show(entry)}: blends that follow each other are a list of "
            "{from_tokens: 0, blend: [[0.9, medical], [0.1, replay]]}"
        )
    return BlendFrom(_convert_int(entry["from_tokens"]), _convert_blend(entry["blend"]))


def _convert_global_batch(value: Any) -> GlobalBatch:
    if not isinstance(value, (list, tuple)):
        return _convert_int(value)
    if not value or not all(isinstance(entry, (list, tuple)) and len(entry) == 2 for entry in value):
        raise ValueProblem("must be a whole number, or a list of [from so many tokens on, number] as [[0, 256], ...]")
    pairs = tuple((_convert_int(tokens), _convert_int(batch)) for tokens, batch in value)
    _check_ascending([tokens for tokens, _ in pairs], "tokens")
    return pairs


def _check_ascending(starts: list[int], what: str) -> None:
    if starts[0] != 0 or any(later <= earlier for earlier, later in pairwise(starts)):
        raise ValueProblem(
            f"begins its parts at {show(starts)} {what}: the first begins at 0, and each later than the one before"
        )


def _convert_layer_split(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return str(_convert_choice(("even", "balanced"), value))
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueProblem("must be even, balanced, or a list with the number of layers of each part, as [11, 11, 10]")
    counts = tuple(_convert_int(count) for count in value)
    if min(counts) < 1:
        raise ValueProblem("must give each part at least one layer")
    return counts


def _convert_pair(pair: Any) -> tuple[float | None, str]:
    rule = "a blend is a list of [weight, prefix] pairs, as [[0.9, medical], [0.1, replay]]"
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise ValueProblem(f"has the entry {show(pair)}: {rule}")
    weight, prefix = pair
    if weight is None and isinstance(prefix, str):
        return None, _convert_str(prefix)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not isinstance(prefix, str):
        raise ValueProblem(f"has the entry {show(pair)}: {rule}")
    if not (math.isfinite(weight) and weight > 0):
        raise ValueProblem(f"gives {prefix} the weight {show(weight)}: weights must be above 0; leave the entry out")
    return float(weight), _convert_str(prefix)


def _check_range(key: Key, value: float) -> None:
    for limit, holds, words in (
        (key.info.minimum, lambda limit: value >= limit, "at least"),
        (key.info.above, lambda limit: value > limit, "above"),
        (key.info.maximum, lambda limit: value <= limit, "at most"),
        (key.info.below, lambda limit: value < limit, "below"),
    ):
        if limit is not None and not holds(limit):
            raise ValueProblem(f"must be {words} {show(limit)}")


_CONVERTERS: dict[Any, Any] = {bool: _convert_bool, int: _convert_int, float: _convert_float, str: _convert_str}
