"""GPUs and the wires between them, as figures: data-sheet rates, and what share of them programs reach.

Each GPU and each interconnect is a YAML file (`megatron/plan/hardware/`); a path to a file of one's own will do too.
Efficiencies are one set per GPU, fitted to published runs (docs/planner.md), never one per run.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megatron.utils.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates are dense peaks; efficiencies are shares of them.

    `product_efficiency` is reached by a large matrix product, less what its last wave of tiles leaves idle and what
    an inner dim that is not long beside `product_half_depth` costs. `launch_s` is what each kernel costs besides.
    `reserved_bytes` is what the driver, the communication library and the product library hold;
    `fragmentation` the share of the peak that the allocator loses between blocks.
    """

    description: str
    memory_bytes: float
    reserved_bytes: float
    fragmentation: float
    bf16_flops_per_s: float
    fp32_flops_per_s: float
    memory_bytes_per_s: float
    multiprocessors: int
    power_w: float
    product_efficiency: float
    product_half_depth: float
    attention_efficiency: float
    memory_efficiency: float
    launch_s: float

    def peak_flops_per_s(self, precision: str) -> float:
        """Peak of matrix products at a `train.precision`."""
        return self.bf16_flops_per_s if precision == "bf16" else self.fp32_flops_per_s


@dataclass(frozen=True)
class Interconnect:
    """How GPUs are joined: `gpus_per_node` by links of `link_bytes_per_s` one way each, the nodes by a network that
    carries `network_bytes_per_s` out of each node, all its adapters together."""

    description: str
    gpus_per_node: int
    link_bytes_per_s: float
    link_efficiency: float
    link_latency_s: float
    network_bytes_per_s: float
    network_efficiency: float
    network_latency_s: float


def load_gpu(name: str) -> Gpu:
    """A GPU by name or file. Raises ConfigError for an unknown one or a file that does not describe one."""
    return _load(Gpu, "gpu", name)


def load_interconnect(name: str) -> Interconnect:
    """An interconnect by name or file. Raises ConfigError as `load_gpu` does."""
    return _load(Interconnect, "interconnect", name)


def default_interconnect(gpu: str) -> str:
    """What the GPU of this name usually comes with. Raises ConfigError for a GPU of a file of one's own."""
    usual = {"a100": "dgx-a100", "h100": "dgx-h100", "h200": "dgx-h100"}
    found = usual.get(gpu.partition("-")[0])
    if found is None:
        raise ConfigError(
            f"--interconnect is needed with --gpu {gpu}: one of {', '.join(names('interconnect'))}, or a file"
        )
    return found


def names(kind: str) -> list[str]:
    """The names of a kind, `gpu` or `interconnect`, that come with the package."""
    folder = resources.files("megatron.plan") / "hardware" / kind
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def _load(kind: type[T], folder: str, name: str) -> T:
    if name in names(folder):
        text = (resources.files("megatron.plan") / "hardware" / folder / f"{name}.yaml").read_text()
    elif Path(name).is_file():
        text = Path(name).read_text()
    else:
        known = names(folder)
        guess = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {guess[0]}? " if guess else ""
        raise ConfigError(f"unknown {folder} {name!r}: {hint}use one of {', '.join(known)}, or the path of a YAML file")
    return _from_yaml(kind, text, name)


def _from_yaml(kind: type[T], text: str, where: str) -> T:
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must be a table of {', '.join(fields)}")
    problems = [f"{name} is missing" for name in fields if name not in content]
    problems += [f"{name} is unknown" for name in content if name not in fields]
    values: dict[str, Any] = {}
    for name in fields.keys() & content.keys():
        try:
            values[name] = content[name] if name == "description" else _number(fields[name].type, content[name])
        except (TypeError, ValueError):
            problems.append(f"{name}={content[name]!r} is not a number")
    problems += [f"{name}={value} is negative" for name, value in values.items() if name != "description" and value < 0]
    if problems:
        raise ConfigError(f"{where}: {'; '.join(problems)}")
    return kind(**values)


def _number(kind: Any, value: Any) -> float | int:
    number = float(value)
    if kind == "int":
        if number != int(number):
            raise ValueError(value)
        return int(number)
    return number
