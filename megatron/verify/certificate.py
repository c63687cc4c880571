"""Runs a configuration on its grid and on one rank, compares them, and shows that the comparison can fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.config.run import RunConfig
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Grid
from megatron.train.adapters import plan_lora
from megatron.train.build import make_plan
from megatron.utils.errors import ConfigError
from megatron.utils.units import format_bytes
from megatron.verify.communicator import Use
from megatron.verify.compare import TOLERANCE, Deviation, deviations
from megatron.verify.job import in_float64, on_one_rank, run_rank
from megatron.verify.pool import Pool, WorkerError

# Float64 weights, gradients and moments, and as much again for what the comparison holds.
_BYTES_PER_PARAMETER = 2 * 4 * 8
_JOB_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Mutation:
    """A run without one use of one axis, and how far it was off; `None` where the program stopped by itself."""

    use: Use
    deviation: float | None

    @property
    def caught(self) -> bool:
        return self.deviation is None or self.deviation > 1e3 * TOLERANCE


@dataclass(frozen=True)
class Certificate:
    """The result: all deviations, largest first, and the mutations that were tried."""

    grid: Grid
    parameters: int
    deviations: list[Deviation]
    mutations: list[Mutation]

    @property
    def largest(self) -> Deviation:
        return self.deviations[0]

    @property
    def holds(self) -> bool:
        return self.largest.value <= TOLERANCE and all(mutation.caught for mutation in self.mutations)


def certify(
    config: RunConfig, model: ModelConfig, world_size: int, *, mutate: bool, say: Callable[[str], None]
) -> Certificate:
    """Compare `config` on `world_size` processes with one rank. Raises ConfigError for what cannot be run here."""
    plan = make_plan(in_float64(config), model, world_size)
    plan_lora(config.lora, model)  # what cannot be is said before anything is started
    check_memory(model, world_size)
    say(f"one rank, reference kernels, {model.num_parameters:,} parameters in float64 ...")
    with Pool(1) as alone, Pool(world_size) as together:
        (reference,) = _run(alone, on_one_rank(config), model, 1, "reference", None)
        say(f"{world_size} ranks ...")
        results = _run(together, config, model, world_size, "auto", None)
        found = deviations(results, reference)
        mutations = []
        for use in sorted({use for result in results for use in result.used}) if mutate else ():
            say(f"{world_size} ranks without {use[1]} over {use[0]} ...")
            mutations.append(Mutation(use, _far(together, config, model, world_size, use, reference)))
    return Certificate(plan.grid, model.num_parameters, found, mutations)


def check_memory(model: ModelConfig, world_size: int) -> None:
    """Raise ConfigError where one rank's model and all shares together would not fit on this machine."""
    needed = model.num_parameters * _BYTES_PER_PARAMETER * 2
    free = _available_bytes()
    if needed > free:
        raise ConfigError(
            f"a model of {model.num_parameters:,} parameters in float64, once on one rank and once on {world_size}, "
            f"needs about {format_bytes(needed)}; {format_bytes(free)} are free here. Shrink it: "
            "--model.num_hidden_layers 4 --model.hidden_size 256 --model.intermediate_size 512 --model.vocab_size 1000"
        )


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo names no MemAvailable")


def _run(pool: Pool, *arguments: object) -> list:  # type: ignore[type-arg]
    return pool.run(run_rank, *arguments, timeout_s=_JOB_TIMEOUT_S)


def _far(
    pool: Pool, config: RunConfig, model: ModelConfig, world_size: int, use: Use, reference: object
) -> float | None:
    try:
        results = _run(pool, config, model, world_size, "auto", use)
    except WorkerError:
        return None
    return deviations(results, reference)[0].value  # type: ignore[arg-type]


def parse_grid(text: str, config: RunConfig) -> tuple[RunConfig, int]:
    """`tp=2,pp=2,cp=2,dp=2` → the configuration with these axes, and the number of processes. An axis that is not named
    is as in the configuration, data 1. Raises ConfigError for another word or size."""
    sizes = {"tp": config.parallel.tensor, "pp": config.parallel.pipeline, "cp": config.parallel.context, "dp": 1}
    for word in filter(None, text.split(",")):
        name, equals, number = word.strip().partition("=")
        if name not in sizes or not equals or not number.isdigit() or int(number) < 1:
            raise ConfigError(f"--grid {text}: {word!r} is not an axis with a size; write it as tp=2,pp=2,cp=2,dp=2")
        sizes[name] = int(number)
    parallel = dataclasses.replace(config.parallel, tensor=sizes["tp"], pipeline=sizes["pp"], context=sizes["cp"])
    world_size = sizes["tp"] * sizes["pp"] * sizes["cp"] * sizes["dp"]
    return dataclasses.replace(config, parallel=parallel), world_size
