"""Between the trainer and the checkpoint package: restoring a run, saving it, and what may change between the two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.manager import apply_retention
from megatron.checkpoint.native import step_folder
from megatron.checkpoint.source import Source
from megatron.checkpoint.store import save_checkpoint
from megatron.checkpoint.together import Wanted, read_together
from megatron.checkpoint.weights import weight_kinds
from megatron.config.dump import differences, dump_config, to_dict
from megatron.config.run import RunConfig
from megatron.data.build import blends_begun
from megatron.model.config import spell_for_both
from megatron.model.initialize import initial_values
from megatron.model.lora import adapter_of, adapter_values
from megatron.optim.adamw import AdamW
from megatron.parallel.layout import Region
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.world import World
from megatron.train.origin import Origin
from megatron.train.state import Progress
from megatron.train.step import TrainingStep
from megatron.utils.errors import ConfigError
from megatron.utils.logging import get_logger

_logger = get_logger(__name__)


def start_from(origin: Origin, step: TrainingStep, seed: int) -> None:
    """Fill weights, masters and, where a run is resumed, the optimizer's state from where the run starts."""
    if origin.source is None:
        step.fill(initial_values(origin.model, seed))
        return
    source = origin.source if origin.lora is None else origin.adapters  # of the weights that are trained
    optimizer = step.optimizer
    if source is None:
        step.fill_together(lambda wanted: _fill_parts(origin, None, wanted, step, seed))
        return
    dtype = next(step.model.parameters()).dtype
    # What is stored in a higher precision than the weights here, the masters keep.
    stored = {source.dtype(name) for name in source.shapes()}
    precise = optimizer.has_masters and any(torch.promote_types(dtype, other) != dtype for other in stored)
    masters = bool(source.shapes("master"))
    step.fill_together(lambda wanted: _fill_parts(origin, source, wanted, step, seed), masters=precise and not masters)
    if masters:
        _load_state(optimizer, source, "master", "master")
    if origin.resume:
        for kind in ("exp_avg", "exp_avg_sq"):
            _load_state(optimizer, source, kind, kind)
        optimizer.set_updates(int((source.state or {}).get("updates", 0)))


def _fill_parts(origin: Origin, source: Source | None, wanted: Wanted, step: TrainingStep, seed: int) -> None:
    """Read the weights that are trained from `source` (None: make them), and those under adapters from the model."""
    axes = (step.context.tp, step.context.replica, step.context.shard)
    dtype = next(step.model.parameters()).dtype
    if origin.base is not None:
        under = [pair for pair in wanted if adapter_of(pair[0].name) is None]
        read_together(origin.base, under, axes, weight_kinds(origin.base, dtype))
        wanted = [pair for pair in wanted if adapter_of(pair[0].name) is not None]
    if source is not None:
        read_together(source, wanted, axes, weight_kinds(source, dtype))
        return
    values = adapter_values(origin.model, seed)
    for region, view in wanted:
        values(region, view)


def _load_state(optimizer: AdamW, source: Source, kind: str, stored_kind: str) -> None:
    if kind != "master" or optimizer.has_masters:
        for region, view in optimizer.state_regions(kind):
            source.read(region, view, stored_kind)


def check_resume(config: RunConfig, source: Source, data: Mapping[str, Any]) -> None:
    """Compare a resumed run's configuration with the saved one: list what differs, refuse what must not.

    `data` describes the order of the samples. Raises ConfigError for another order: the position in it would mean
    other samples, so some would be read twice and others never.
    """
    state = source.state or {}
    saved = state.get("data", {})
    changed = [key for key in data if key in saved and saved[key] != data[key]]
    if changed == ["data.train"] and config.data.order == "stable" and _differ_in_blends_to_come(saved, data, state):
        changed = []
    if changed:
        hint = ""
        if "data.samples" in changed:
            hint = (
                " (Megatron's order depends on it: a run that may be extended sets it, or data.order=stable, at first.)"
            )
        listed = "; ".join(f"{key} was {json.dumps(saved[key])}, now {json.dumps(data[key])}" for key in changed)
        raise ConfigError(
            f"{source.folder} was trained on another order of samples: {listed}. Set {', '.join(changed)} as it was to "
            "resume, or start a new run from these weights with model.init_from and another checkpoint.save." + hint
        )
    for line in differences(source.run_config or {}, to_dict(config)):
        _logger.info("changed since the checkpoint: %s", line)


def _differ_in_blends_to_come(saved: Mapping[str, Any], now: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Whether two orders of stored samples are the same up to the position of a run."""
    sides = [side["data.train"] for side in (saved, now)]
    if not all(isinstance(side, list) for side in sides):
        return False
    position, length = int(state.get("consumed_samples", 0)), int(now["data.sequence_length"])
    old, new = (blends_begun(side, position, length) for side in sides)
    return old == new


class Checkpoints:
    """Saves one run into its folder; `folder` None saves nothing."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        context: ParallelContext,
        origin: Origin,
        carried: Mapping[str, bytes],
        data: Mapping[str, Any],
        adapter: Mapping[str, Any] | None = None,
    ) -> None:
        """`adapter` is what a checkpoint says of its adapters, where it holds these alone."""
        self.config, self.world, self.context, self.origin = config, world, context, origin
        self.carried, self.data = carried, data
        self._adapter = adapter
        self.folder = None if config.checkpoint.save is None else Path(config.checkpoint.save)
        self._last_saved: int | None = None

    @property
    def how_to_continue(self) -> str:
        """What to tell who stopped the run."""
        if self.folder is None:
            return "nothing was saved, since checkpoint.save is not set"
        return "run the same command again to continue"

    def save(self, step: TrainingStep, progress: Progress) -> None:
        """Write `SAVE/step_…` from all ranks together, unless this very step was saved just before."""
        if self.folder is None or self._last_saved == progress.step:
            return
        folder = self.folder / step_folder(progress.step)
        tensors: dict[str, list[tuple[Region, torch.Tensor]]] = {}
        # Each rank writes what it owns; of ranks that own the same, the first.
        if self.context.replica.rank == 0:
            tensors["weights"] = list(step.weight_regions(copies=False))
            for kind in AdamW.STATE_KINDS:
                if kind != "master" or step.optimizer.has_masters:
                    tensors[kind] = list(step.optimizer.state_regions(kind, copies=False))
        save_checkpoint(
            folder,
            rank=self.world.launch.rank,
            exchange=self.world.exchange,
            tensors=tensors,
            state={
                **progress.to_dict(),
                "updates": step.optimizer.updates,
                "data": dict(self.data),
                **({} if self._adapter is None else {"adapter": dict(self._adapter)}),
                "grid": {
                    "tensor": self.context.tp.size,
                    "context": self.context.cp.size,
                    "pipeline": self.context.pp.size,
                    "data": self.context.data.size,
                },
            },
            model_config=spell_for_both(self.origin.huggingface, _dtype_name(step.model)),
            run_config_yaml=dump_config(self.config),
            carried=self.carried,
        )
        self._last_saved = progress.step
        _logger.info("saved %s", folder)
        if self.world.launch.rank == 0:
            apply_retention(self.folder, self.config.checkpoint.keep_last, up_to=progress.step)


def _dtype_name(model: torch.nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")
