"""How a flag of Megatron-LLM's trainer is declared: what it takes, and what becomes of it here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# maps: it sets keys of the configuration. implied: what it asks for is always so. ignored: accepted with one notice.
# refused: an error that says why, but for values that ask for nothing.
Treatment = Literal["maps", "implied", "ignored", "refused"]
Kind = Literal["switch", "text", "whole", "number", "words", "wholes"]


@dataclass(frozen=True)
class Flag:
    """One flag. `about` says for `maps` which keys it sets or what it does, else what is the case and what to do.

    `key` is set to the value as it stands (for a switch to `sets`); without it, a rule in `translate` reads the flag.
    `neutral` are values that a refused flag may have. `example` is a value to try it with.
    """

    name: str
    kind: Kind
    treatment: Treatment
    about: str
    key: str | None = None
    sets: object = True
    choices: tuple[str, ...] = ()
    neutral: tuple[object, ...] = ()
    example: str = ""

    @property
    def option(self) -> str:
        """As it is written on a command line."""
        return f"--{self.name}"


def key(
    name: str, dotted: str, kind: Kind, example: str, *, choices: tuple[str, ...] = (), sets: object = True
) -> Flag:
    """A flag whose value is that of a configuration key."""
    return Flag(name, kind, "maps", f"`{dotted}`", dotted, sets, choices, (), example)


def rule(name: str, kind: Kind, about: str, example: str = "", *, choices: tuple[str, ...] = ()) -> Flag:
    """A flag that means something together with others or with what the run starts from."""
    return Flag(name, kind, "maps", about, choices=choices, example=example)


def implied(about: str, kind: Kind, *names: str, choices: tuple[str, ...] = ()) -> list[Flag]:
    """Flags that ask for what is always so."""
    return [Flag(name, kind, "implied", about, choices=choices) for name in names]


def ignored(about: str, kind: Kind, *names: str) -> list[Flag]:
    """Flags that are accepted with a notice that says what is done instead."""
    return [Flag(name, kind, "ignored", about) for name in names]


def refused(about: str, kind: Kind, *names: str, neutral: tuple[object, ...] = ()) -> list[Flag]:
    """Flags that are an error, unless their value asks for nothing."""
    return [Flag(name, kind, "refused", about, neutral=neutral) for name in names]
