"""Where figures go: a JSON lines file, and TensorBoard or Weights & Biases where asked for.

Only one rank has sinks. Figures come as plain numbers.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron.config.log import LogConfig
from megatron.utils.errors import ConfigError
from megatron.utils.files import write_atomically
from megatron.utils.logging import get_logger

_logger = get_logger(__name__)

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"


class Sink(Protocol):
    """Takes the figures of one step."""

    def write(self, step: int, figures: Mapping[str, float | int]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: one object for each logged step, appended; lines past the restored step are dropped first."""

    def __init__(self, path: Path, restored_step: int) -> None:
        _drop_later(path, restored_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, figures: Mapping[str, float | int]) -> None:
        # JSON has no word for a loss that is not finite
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard in a folder; those past the restored step are shown no more (None: left as they are)."""

    def __init__(self, folder: Path, restored_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "log.tensorboard is on but TensorBoard is not installed: `pip install 'megatron-med[tensorboard]'`, "
                "or turn it off."
            ) from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=None if restored_step is None else restored_step + 1)

    def write(self, step: int, figures: Mapping[str, float | int]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in a Weights & Biases project."""

    def __init__(self, project: str, folder: Path | None, configuration: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "log.wandb_project is set but wandb is not installed: `pip install 'megatron-med[wandb]'`, "
                "or remove the key."
            ) from error
        self._run: Any = wandb.init(project=project, dir=folder, config=dict(configuration))

    def write(self, step: int, figures: Mapping[str, float | int]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


def open_sinks(config: LogConfig, restored_step: int, configuration: Mapping[str, Any]) -> list[Sink]:
    """The sinks that the `log` section asks for. Raises ConfigError where one is not installed or has no folder."""
    folder = None if config.dir is None else Path(config.dir)
    sinks: list[Sink] = []
    if folder is not None:
        sinks.append(JsonLines(folder / METRICS_FILE, restored_step))
        if config.tensorboard:
            sinks.append(TensorBoard(folder / "tensorboard", restored_step))
    elif config.tensorboard:
        raise ConfigError("log.tensorboard needs a folder: set log.dir.")
    if config.wandb_project is not None:
        sinks.append(WeightsAndBiases(config.wandb_project, folder, configuration))
    return sinks


def set_aside(folder: Path) -> None:
    """Keep what an earlier run wrote into a folder in which another one begins: `metrics.jsonl` becomes
    `metrics-1.jsonl`, or the first number that is free, and `config.yaml` likewise."""
    metrics, config = folder / METRICS_FILE, folder / CONFIG_FILE
    if not metrics.exists() or metrics.stat().st_size == 0:
        return
    numbered = ([path.with_stem(f"{path.stem}-{n}") for path in (metrics, config)] for n in itertools.count(1))
    free = next(names for names in numbered if not any(name.exists() for name in names))
    metrics.rename(free[0])
    if config.exists():
        config.rename(free[1])
    _logger.info("%s is of another run and is now %s", metrics, free[0].name)


def _drop_later(path: Path, restored_step: int) -> None:
    """Keep the lines up to the restored step; a half-written last line of a killed run goes as well."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    kept = "".join(line + "\n" for line in lines if _step_of(line) <= restored_step)
    if kept != text:
        _logger.info("%s: %d lines after step %d are dropped", path, len(lines) - kept.count("\n"), restored_step)
        write_atomically(path, kept)


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that is not whole."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
