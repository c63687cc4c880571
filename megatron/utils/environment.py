"""What the launcher says about this process: the only module that touches the process environment.

It owns the names of `torchrun`'s variables. It must not know devices, process groups or the configuration.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """Where this process stands among those that were started together.

    `rank` counts over all hosts (0 … world_size - 1), `local_rank` over this host (0 … local_world_size - 1).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def distributed(self) -> bool:
        """Whether a launcher started several processes."""
        return self.world_size > 1


def read_launch() -> Launch:
    """The launch described by `torchrun`'s variables; one lone process where none of them is set.

    Raises ConfigError where they are incomplete, not numbers, or contradict each other.
    """
    found = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    if found["RANK"] is None and found["WORLD_SIZE"] is None:
        return Launch()
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ConfigError(
            f"the launcher set {_list(found)} but not {', '.join(missing)}; start the processes with torchrun, "
            "or unset these variables to run a single process"
        )
    numbers = {name: _whole_number(name, value) for name, value in found.items() if value is not None}
    launch = Launch(
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        local_world_size=numbers["LOCAL_WORLD_SIZE"],
    )
    if not (launch.rank < launch.world_size and launch.local_rank < launch.local_world_size <= launch.world_size):
        raise ConfigError(
            f"the launcher's variables contradict each other: {_list(found)}; a rank must be below its world size, "
            "and the local world size at most the world size; start the processes with torchrun"
        )
    return launch


def process_age_s() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since the machine was started
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)


def _whole_number(name: str, value: str) -> int:
    if not value.isdecimal():
        raise ConfigError(f"the environment variable {name}={value!r} is not a whole number; torchrun sets it")
    return int(value)


def _list(found: dict[str, str | None]) -> str:
    return ", ".join(f"{name}={value}" for name, value in found.items() if value is not None)


def request_deterministic_products() -> None:
    """Ask cuBLAS for workspaces with which its matrix products are deterministic, unless the user chose some."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def set_for_libraries(variables: Mapping[str, str]) -> None:
    """Tell a library of others what a command line says, in the variables that it reads."""
    os.environ.update(variables)


def wished_compiler() -> str | None:
    """The C++ compiler that the user named for builds, if any."""
    return os.environ.get("CXX") or None
