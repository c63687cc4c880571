"""The presets that come with the package, and how to find one by name."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable


def preset_names() -> list[str]:
    """The names of all presets, sorted."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def find_preset(name: str) -> Traversable | None:
    """The file of a preset, or None where there is none of that name."""
    return resources.files(__name__) / f"{name}.yaml" if name in preset_names() else None
