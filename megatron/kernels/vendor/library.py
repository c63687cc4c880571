"""Importing a library that may be missing, broken or too old, and saying so in one sentence."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from types import ModuleType

import torch

from megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Where an adapter is to run: the device, and its compute capability (None: it is no GPU)."""

    device: torch.device
    capability: tuple[int, int] | None

    def require(self, key: str, lowest: tuple[int, int]) -> None:
        """Raise ConfigError unless this is a GPU of at least this compute capability."""
        rule = f"it needs a GPU of compute capability {_dotted(lowest)} or higher"
        if self.capability is None:
            raise ConfigError(f"{key}=true, but this process runs on {self.device}: {rule}; use {key}=false")
        if self.capability < lowest:
            found = _dotted(self.capability)
            raise ConfigError(f"{key}=true, but {self.device} has compute capability {found}: {rule}; use {key}=false")


def import_library(name: str, key: str, cure: str) -> ModuleType:
    """The module. Raises ConfigError, which names the configuration's `key` and ends with `cure`, where it is missing
    or does not load."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise ConfigError(f"{key}=true, but {name} does not load: {error}; {cure}") from error
        raise ConfigError(f"{key}=true, but there is no module {name}; {cure}") from error
    except (ImportError, OSError) as error:
        raise ConfigError(f"{key}=true, but {name} does not load: {error}; {cure}") from error


def require_version(module: ModuleType, key: str, lowest: tuple[int, ...], below: tuple[int, ...], cure: str) -> str:
    """The library's version. Raises ConfigError unless lowest ≤ version < below."""
    text = str(getattr(module, "__version__", "unknown"))
    found = tuple(int(number) for number in re.findall(r"\d+", re.match(r"[\d.]*", text)[0]))  # type: ignore[index]
    if not lowest <= found < below:
        raise ConfigError(
            f"{key}=true, but {module.__name__} is of version {text}; known is how to use {_dotted(lowest)} up to, "
            f"not including, {_dotted(below)}; {cure}"
        )
    return text


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
