"""Telling `--section.key value` words from the other words of a command line. Light: help must be instant."""

from __future__ import annotations

from collections.abc import Sequence


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide command-line words into `--section.key value` overrides and the rest, each in their order."""
    overrides: list[str] = []
    rest: list[str] = []
    waiting = False  # for the value of an override
    for word in words:
        dotted = word.startswith("--") and "." in word.partition("=")[0]
        (overrides if dotted or (waiting and not word.startswith("--")) else rest).append(word)
        waiting = dotted and "=" not in word
    return overrides, rest
