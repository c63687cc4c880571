"""All flags of the trainer, and reading them off a command line.

Flags are long and never abbreviated, `_` and `-` mean the same in them, and the last of two counts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from types import MappingProxyType

from megatron.config.megatron_llm.flag import Flag
from megatron.config.megatron_llm.flags_data import DATA, LEGACY, LOGGING
from megatron.config.megatron_llm.flags_model import LEARNING_RATE, MODEL, OPTIMIZER, PRECISION
from megatron.config.megatron_llm.flags_run import CHECKPOINTS, DISTRIBUTED, TRAINING
from megatron.utils.errors import ConfigError

GROUPS: MappingProxyType[str, list[Flag]] = MappingProxyType(
    {
        "Model": MODEL,
        "Regularisation and optimizer": OPTIMIZER,
        "Learning rate": LEARNING_RATE,
        "Training loop": TRAINING,
        "Checkpoints": CHECKPOINTS,
        "Precision": PRECISION,
        "Processes": DISTRIBUTED,
        "Evaluation and data": DATA,
        "Logging": LOGGING,
        "Of programs that are not here": LEGACY,
    }
)
FLAGS: MappingProxyType[str, Flag] = MappingProxyType({flag.name: flag for group in GROUPS.values() for flag in group})
# A script of Meditron's gives this name, which the trainer never had.
_ALIASES = {"load_iteration": "load_iters"}

Value = bool | int | float | str | tuple[int, ...] | tuple[str, ...]


def read_flags(words: Sequence[str]) -> dict[str, Value]:
    """The flags that are given, by name. Raises one ConfigError for everything that is wrong with them."""
    values: dict[str, Value] = {}
    problems: list[str] = []
    for name, texts in _split(words, problems):
        flag = FLAGS.get(_ALIASES.get(name, name))
        if flag is None:
            problems.append(unknown_flag(name, FLAGS))
            continue
        try:
            values[flag.name] = _value(flag, texts)
        except ConfigError as error:
            problems.append(str(error))
    problems += [
        f"{FLAGS[name].option} {_show(value)} is refused: {FLAGS[name].about}"
        for name, value in values.items()
        if FLAGS[name].treatment == "refused" and value not in FLAGS[name].neutral
    ]
    raise_problems(problems)
    return values


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one ConfigError for all of them; return where there are none."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(f"the command line has {len(problems)} problems:{listed}")


def unknown_flag(name: str, known: Sequence[str] | MappingProxyType[str, Flag]) -> str:
    """What to say about a flag that does not exist."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"unrecognized arguments: --{name}" + (f"; did you mean --{nearest[0]}?" if nearest else "")


def _split(words: Sequence[str], problems: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(name, its values) of each flag in order."""
    name, texts = "", list[str]()
    for word in words:
        if word.startswith("--") and len(word) > 2:
            if name:
                yield name, texts
            spelled, equals, text = word[2:].partition("=")
            name, texts = spelled.replace("-", "_"), [text] if equals else []
        elif name:
            texts.append(word)
        else:
            problems.append(f"unexpected word {word!r} before the first flag")
    if name:
        yield name, texts


def _value(flag: Flag, texts: list[str]) -> Value:
    if flag.kind == "switch":
        if texts:
            raise ConfigError(f"{flag.option} takes no value, but {' '.join(texts)!r} follows it")
        return True
    if flag.kind in ("words", "wholes"):
        for text in texts:
            _check_choice(flag, text)
        return tuple(_whole(flag, text) for text in texts) if flag.kind == "wholes" else tuple(texts)
    if len(texts) != 1:
        found = f"{' '.join(texts)!r} follows it" if texts else "none follows it"
        raise ConfigError(f"{flag.option} takes one value, but {found}")
    _check_choice(flag, texts[0])
    if flag.kind == "whole":
        return _whole(flag, texts[0])
    if flag.kind == "number":
        try:
            return float(texts[0])
        except ValueError:
            raise ConfigError(f"{flag.option} {texts[0]} is not a number") from None
    return texts[0]


def _whole(flag: Flag, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{flag.option} {text} is not a whole number") from None


def _check_choice(flag: Flag, text: str) -> None:
    if flag.choices and text not in flag.choices:
        nearest = difflib.get_close_matches(text, flag.choices, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ConfigError(f"{flag.option} {text}: it must be one of {', '.join(flag.choices)}{hint}")


def _show(value: Value) -> str:
    if value is True:
        return ""
    return " ".join(str(part) for part in value) if isinstance(value, tuple) else str(value)
