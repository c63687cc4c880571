"""The list of all keys, read off the dataclasses: what loading, the reference and the tests iterate over."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from megatron.config.key import KeyInfo, key_info
from megatron.config.run import RunConfig


@dataclass(frozen=True)
class Key:
    """One configuration key: `section.name`, its Python type, its default and what its declaration says."""

    section: str
    name: str
    type: Any
    default: Any
    info: KeyInfo

    @property
    def dotted(self) -> str:
        """The key as overrides spell it."""
        return f"{self.section}.{self.name}"


def sections() -> dict[str, type]:
    """The dataclass of each section, in their order."""
    return dict(typing.get_type_hints(RunConfig))


@cache
def all_keys() -> MappingProxyType[str, Key]:
    """Every key by its dotted name, in the order of declaration."""
    found = {}
    for section, owner in sections().items():
        hints = typing.get_type_hints(owner)
        for field in dataclasses.fields(owner):
            key = Key(section, field.name, hints[field.name], field.default, key_info(field))
            found[key.dotted] = key
    return MappingProxyType(found)


def explain_unknown(section: str, name: str | None = None) -> str:
    """What to say about a section or key that does not exist: the nearest one that does, or the list."""
    if section not in sections():
        what = f"unknown section {section!r}" if name is None else f"unknown key {section}.{name}"
        if name is not None and (nearest := _nearest_key(section, name)):
            return f"{what}; did you mean {nearest}?"
        guess = nearest_name(section, sections())
        return f"{what}; " + (f"did you mean {guess}?" if guess else f"the sections are {', '.join(sections())}")
    if name is None:
        return f"{section} is a section and takes keys, for example {_names(section)[0]}"
    nearest = _nearest_key(section, name)
    hint = f"did you mean {nearest}?" if nearest else f"the keys of {section} are {', '.join(_names(section))}"
    return f"unknown key {section}.{name}; {hint}"


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, or None where none is like it."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def _nearest_key(section: str, name: str) -> str | None:
    """The same name in another section; else the nearest name in this section, or of all if there is none such."""
    homes = [dotted for dotted, key in all_keys().items() if key.name == name]
    if homes:
        return nearest_name(f"{section}.{name}", homes) or homes[0]
    if section not in sections():
        return nearest_name(f"{section}.{name}", all_keys())
    names = _names(section)
    longer = (known for known in names if known in name or name in known)
    within = nearest_name(name, names) or next(longer, None)
    return f"{section}.{within}" if within else None


def _names(section: str) -> list[str]:
    return [key.name for key in all_keys().values() if key.section == section]
