"""Loading: a YAML file or preset, its base, the command line's overrides → one validated `RunConfig`.

All problems are gathered and reported together, each with the place the value came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron.config import yaml_text
from megatron.config.presets import find_preset, preset_names
from megatron.config.run import RunConfig
from megatron.config.schema import all_keys, explain_unknown, nearest_name, sections
from megatron.config.validate import Problem, grid_problems, report, static_problems
from megatron.config.values import ValueProblem, convert, show, takes_text
from megatron.utils.errors import ConfigError

COMMAND_LINE = "command line"


@dataclass
class _Draft:
    """Values as they were found, by dotted key, with where each came from; later ones replace earlier ones."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def set(self, dotted: str, value: Any, origin: str) -> None:
        section, _, name = dotted.partition(".")
        if dotted not in all_keys():
            self.problems.append(f"{explain_unknown(section, name or None)} ({origin})")
        else:
            self.values[dotted], self.origins[dotted] = value, origin


def load_config(
    config: str | None, overrides: Sequence[str] = (), *, world_size: int | None = None, problems: Sequence[str] = ()
) -> RunConfig:
    """The configuration in a YAML file or preset (None: the defaults) with `--section.key value` overrides applied.

    `config` is a path, or the name of a preset. `overrides` are command-line words: `--section.key value` or
    `--section.key=value`, values in YAML. With a `world_size` it must fit a training run of as many processes.
    Raises one ConfigError that lists every problem, those that the caller has found already (`problems`) first.
    """
    draft = _Draft(problems=list(problems))
    if config is not None:
        try:
            _read_with_base(draft, config)
        except ConfigError as error:
            report(Problem((), text) for text in (*draft.problems, str(error)))
    for dotted, text in _split_overrides(draft, overrides):
        _apply_override(draft, dotted, text)
    return _finish(draft, world_size)


def config_from_dict(values: Mapping[str, Any], origin: str) -> RunConfig:
    """The configuration in a nested dict, as `to_dict` gives it or a checkpoint holds it. `origin` is for messages."""
    draft = _Draft()
    _read_mapping(draft, values, origin)
    return _finish(draft)


def _finish(draft: _Draft, world_size: int | None = None) -> RunConfig:
    """Convert, build and check; what concerns a key that is already in error is left out of the cross-checks."""
    converted: dict[str, Any] = {}
    for dotted, value in draft.values.items():
        try:
            converted[dotted] = convert(all_keys()[dotted], value)
        except ValueProblem as problem:
            draft.problems.append(f"{dotted}={show(value)} {problem} ({draft.origins[dotted]})")
    broken = set(draft.values) - set(converted)
    built = {
        section: owner(
            **{name.partition(".")[2]: value for name, value in converted.items() if name.startswith(section + ".")}
        )
        for section, owner in sections().items()
    }
    config = RunConfig(**built)
    found = [*static_problems(config), *([] if world_size is None else grid_problems(config, world_size))]
    later = [problem for problem in found if not broken.intersection(problem.keys)]
    report([*(Problem((), text) for text in draft.problems), *later])
    return config


def _read_with_base(draft: _Draft, config: str) -> None:
    """Read a file or preset after the base that it names; a base has no base of its own."""
    content, origin, folder = _read_source(config, Path())
    base = content.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"base={show(base)} must be a path or the name of a preset ({origin})")
        base_content, base_origin, _ = _read_source(base, folder)
        if base_content.pop("base", None) is not None:
            raise ConfigError(
                f"{origin} has the base {base_origin}, which has a base itself; only one level is allowed: "
                f"copy what is needed from {base_origin}"
            )
        _read_mapping(draft, base_content, base_origin)
    _read_mapping(draft, content, origin)


def _read_source(name: str, folder: Path) -> tuple[dict[str, Any], str, Path]:
    """(content, what to call it in messages, its folder) of a path relative to `folder`, or of a preset."""
    preset = find_preset(name)
    if preset is not None:
        return _read_yaml(preset.read_text(encoding="utf-8"), f"preset {name}"), f"preset {name}", Path()
    path = folder / name
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(_not_found(name, path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    return _read_yaml(text, str(path)), str(path), path.parent


def _not_found(name: str, path: Path) -> str:
    guess = nearest_name(name, preset_names())
    hint = f"did you mean {guess}?" if guess else f"the presets are {', '.join(preset_names())}"
    return f"there is no configuration file {path} and no preset {name!r}; {hint}"


def _read_yaml(text: str, origin: str) -> dict[str, Any]:
    try:
        content = yaml_text.parse(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin} is not YAML: {_one_line(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{origin} must hold sections (`train:`, then `  steps: 100`), not {show(content)}")
    return content


def _read_mapping(draft: _Draft, content: Mapping[str, Any], origin: str) -> None:
    for section, values in content.items():
        if section not in sections():
            draft.problems.append(f"{_unknown_section(str(section))} ({origin})")
        elif isinstance(values, Mapping):
            for name, value in values.items():
                draft.set(f"{section}.{name}", value, origin)
        elif values is not None:
            draft.problems.append(f"{section}={show(values)}: {explain_unknown(section)} ({origin})")


def _unknown_section(section: str) -> str:
    if section in all_keys():
        owner, name = section.split(".")
        return f"{section} is not a section; write `{owner}:` and, indented below it, `{name}: ...`"
    return explain_unknown(section)


def _split_overrides(draft: _Draft, overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    words = iter(overrides)
    for word in words:
        name, equals, text = word.partition("=")
        if not name.startswith("--"):
            draft.problems.append(f"unexpected word {word!r}; put a value that has spaces in quotes ({COMMAND_LINE})")
            continue
        value = text if equals else next(words, None)
        if value is None:
            draft.problems.append(f"{name} needs a value ({COMMAND_LINE})")
        else:
            yield name.removeprefix("--").replace("-", "_"), value


def _apply_override(draft: _Draft, dotted: str, text: str) -> None:
    try:
        value = yaml_text.parse(text)
    except (yaml.YAMLError, ValueError) as error:
        draft.problems.append(f"--{dotted} {text!r} is not YAML: {_one_line(error)} ({COMMAND_LINE})")
        return
    key = all_keys().get(dotted)
    if key is not None and takes_text(key) and isinstance(value, (bool, int, float)):
        value = text  # `--log.dir 2024` names a folder
    draft.set(dotted, value, COMMAND_LINE)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
