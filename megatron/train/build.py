"""From a configuration to a trainer that stands where the run should start."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.native import read_carried
from megatron.checkpoint.source import what_makes_it_a_model
from megatron.config.batches import Ramp, largest_batch
from megatron.config.data import SYNTHETIC
from megatron.config.dump import dump_config, to_dict
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig
from megatron.config.validate import validate_grid
from megatron.data.build import check_tokenizer, data_prefixes, validation_prefixes
from megatron.data.loader import BatchLoader
from megatron.evaluate.markers import find_markers
from megatron.evaluate.perplexity import Evaluation, evaluate_parts
from megatron.model.config import ModelConfig
from megatron.model.families import dropout_notice
from megatron.model.flops import head_cost_in_layers, model_flops_per_token
from megatron.model.lora import Lora, adapt
from megatron.model.specs import count_adapters
from megatron.model.transformer import ChunkedTransformer, Transformer, build_stage
from megatron.parallel.mesh import Grid, ParallelContext, connect
from megatron.parallel.pipeline.partition import Part, cut, describe_partition
from megatron.parallel.world import World
from megatron.tokenizer import find_tokenizer, load_tokenizer, local_tokenizer
from megatron.train.adapters import adapter_state
from megatron.train.checkpoints import Checkpoints, check_resume, start_from
from megatron.train.datasets import (
    describe_order,
    figures_of_sources,
    test_config,
    training_dataset,
    validation_sets,
)
from megatron.train.hooks import CollectGarbage
from megatron.train.kernels import choose_kernels, install
from megatron.train.metrics import Metrics, Speed
from megatron.train.origin import Origin, find_origin
from megatron.train.reporting import build_hooks, open_lines, told_save
from megatron.train.signals import STOP_FILE, StopWish
from megatron.train.sinks import CONFIG_FILE, Sink, open_sinks, set_aside
from megatron.train.state import Progress
from megatron.train.step import TrainingStep
from megatron.train.trainer import Trainer
from megatron.utils.device import peak_flops_per_s, seed_everything
from megatron.utils.errors import ConfigError
from megatron.utils.files import ensure_writable_folder, write_atomically
from megatron.utils.logging import get_logger
from megatron.utils.units import format_bytes, format_count

_logger = get_logger("megatron.train")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The values that follow from the configuration, the model and the number of processes."""

    grid: Grid
    sequence_length: int
    sequence_parallel: bool
    zero: int
    shard: int
    ramp: Ramp
    samples: int
    decay_steps: int
    micro_batches: int  # of the largest batch
    parts: tuple[Part, ...]

    @property
    def length_unit(self) -> int:
        """Of which the length of a sample must be a multiple for the ranks to share it."""
        context = self.grid.context
        halves = 2 * context if context > 1 else 1
        return math.lcm(halves, context * (self.grid.tensor if self.sequence_parallel else 1))


def make_plan(config: RunConfig, model: ModelConfig, world_size: int) -> Plan:
    """Fill in what the configuration leaves open. Raises ConfigError for what cannot be run on this many processes."""
    validate_grid(config, world_size, dataclasses.asdict(model))
    parallel, train = config.parallel, config.train
    grid = Grid.of_world(world_size, parallel.tensor, parallel.pipeline, parallel.context)
    sequence_length = config.data.sequence_length or model.max_position_embeddings
    parts = cut(
        model.num_hidden_layers,
        parallel.pipeline * parallel.chunks,
        parallel.layers,
        head_cost_in_layers(model, sequence_length),
    )
    ramp = Ramp.of(train.global_batch, sequence_length)
    zero, shard = _division(parallel, grid.data * grid.context)
    return Plan(
        grid=grid,
        sequence_length=sequence_length,
        sequence_parallel=parallel.tensor > 1 if parallel.sequence is None else parallel.sequence,
        zero=zero,
        shard=shard,
        ramp=ramp,
        samples=config.data.samples or ramp.position_after(train.steps),
        decay_steps=config.optimizer.decay_steps or train.steps,
        micro_batches=largest_batch(train.global_batch) // (train.micro_batch * grid.data),
        parts=tuple(parts),
    )


def _division(parallel: ParallelConfig, ranks: int) -> tuple[int, int]:
    """(what ZeRO divides, among how many of the data x context ranks): one rank divides nothing."""
    zero = 1 if parallel.zero is None else parallel.zero
    shard = parallel.zero_within or ranks
    return (zero, shard) if zero and shard > 1 else (0, 1)


@contextmanager
def build_trainer(config: RunConfig, world: World) -> Iterator[Trainer]:
    """Everything that `megatron train` needs, made alike on all ranks; closed at the end."""
    world.agree(lambda: _prepare_folders(config, world))
    seed_everything(config.train.seed, config.train.deterministic)
    origin = find_origin(config, world)
    plan = world.agree(lambda: make_plan(config, origin.model, world.launch.world_size))
    tokenizer = _find_tokenizer(config, origin, world)
    carried = world.agree(lambda: _check_tokenizer(config, origin, tokenizer))
    data_state = world.agree(lambda: describe_order(config, sequence_length=plan.sequence_length, samples=plan.samples))
    progress = world.agree(lambda: _restore_progress(config, origin, data_state))
    context = connect(
        plan.grid,
        world.launch.rank,
        sequence=plan.sequence_parallel,
        num_key_value_heads=origin.model.num_key_value_heads,
        wraps=config.parallel.chunks > 1,
        context_attention=config.parallel.context_attention,
        shard=plan.shard,
        timeout_s=config.parallel.timeout_s,
    )
    vendor = choose_kernels(config.kernels, origin.model, plan.grid.tensor, world)
    step = build_step(config, plan, origin.model, context, world.device, origin.lora)
    install(vendor, step.model)
    world.agree(lambda: start_from(origin, step, config.train.seed))
    adapter = world.agree(lambda: _describe_adapter(config, origin) if world.launch.rank == 0 else None)
    origin.close()
    with ExitStack() as stack:
        checkpoints = Checkpoints(config, world, context, origin, carried, data_state, adapter)
        loader = stack.enter_context(
            world.agree(lambda: open_loader(config, plan, origin.model, context, progress.consumed_samples))
        )
        sinks = world.agree(lambda: _open_sinks(config, progress) if world.launch.rank == 0 else [])
        for sink in sinks:
            stack.callback(sink.close)
        adapters = count_adapters(origin.model, origin.lora)
        speed = Speed(
            model_flops_per_token(origin.model, plan.sequence_length, adapters=adapters),
            peak_flops_per_s(world.device, DTYPES[config.train.precision]),
            world.launch.world_size,
        )
        metrics = Metrics(speed, progress)
        validated, tested = (None if config.evaluate.interval is None else config), test_config(config)
        validate = world.agree(lambda: _evaluation(validated, plan, origin, step.model, tokenizer, world))
        test = world.agree(lambda: _evaluation(tested, plan, origin, step.model, tokenizer, world))
        stop_file = Path(config.log.dir) / STOP_FILE if config.log.dir and world.launch.rank == 0 else None
        wish = stack.enter_context(StopWish(stop_file, config.train.exit_interval, config.train.exit_minutes))
        if progress.step < config.train.steps:
            _describe_run(config, plan, origin, step, world, progress)

        lines = stack.enter_context(open_lines(config, world, plan.ramp, plan.decay_steps, progress, sinks))
        save = told_save(config, lines, lambda: checkpoints.save(step, progress), progress)
        hooks = build_hooks(
            config,
            metrics,
            sinks,
            lines,
            validate=validate,
            test=test,
            save=save,
            progress=progress,
            read_so_far=figures_of_sources(loader.dataset),
        )
        if config.train.gc_interval is not None:
            hooks.append(stack.enter_context(CollectGarbage(config.train.gc_interval)))
        yield Trainer(
            world,
            step,
            loader,
            progress,
            hooks,
            wish,
            save,
            steps=config.train.steps,
            ramp=plan.ramp,
            how_to_continue=checkpoints.how_to_continue,
        )


def _prepare_folders(config: RunConfig, world: World) -> None:
    """Find out now, not at the first save, that a folder cannot be written."""
    if world.launch.rank != 0:
        return
    if config.checkpoint.save is not None:
        save = Path(config.checkpoint.save)
        evidence = what_makes_it_a_model(save)
        if evidence is not None:
            raise ConfigError(
                f"checkpoint.save={save} is the folder of a model (it holds {evidence}): checkpoints beside its files "
                "would not be found again. Name another folder, and this one as model.init_from to start from it."
            )
        ensure_writable_folder(save, "checkpoint.save")
    if config.log.dir is not None:
        ensure_writable_folder(Path(config.log.dir), "log.dir")


def _open_sinks(config: RunConfig, progress: Progress) -> list[Sink]:
    """The sinks, and the configuration beside them: only now, since a run that was refused must not leave its own."""
    if config.log.dir is not None:
        folder = Path(config.log.dir)
        if progress.step == 0:
            set_aside(folder)
        write_atomically(folder / CONFIG_FILE, dump_config(config))
    return open_sinks(config.log, progress.step, to_dict(config))


def _check_tokenizer(config: RunConfig, origin: Origin, tokenizer: Path | None) -> dict[str, bytes]:
    """Compare data and model through the tokenizer, where there is one; returns the files to save along.

    They are read now: the checkpoint that a resumed run takes them from may soon be removed.
    """
    carried = {} if origin.source is None else origin.source.carried()
    check_tokenizer(data_prefixes(config.data), tokenizer, origin.model.vocab_size)
    if config.tokenizer.path is not None and tokenizer is not None:
        carried |= read_carried(load_tokenizer(tokenizer).files)
    return carried


def _find_tokenizer(config: RunConfig, origin: Origin, world: World) -> Path | None:
    """The tokenizer that is named, or that of the model folder; None where neither is there."""
    if config.tokenizer.path is not None:
        path = config.tokenizer.path
        return Path(world.once_per_machine(lambda: str(local_tokenizer(path))))
    return None if origin.source is None else find_tokenizer(origin.source.tokenizer_folder)


def _restore_progress(config: RunConfig, origin: Origin, data_state: dict[str, Any]) -> Progress:
    if not origin.resume or origin.source is None:
        return Progress()
    check_resume(config, origin.source, data_state)
    return Progress.from_dict(origin.source.state or {}, str(origin.source.folder))


def build_step(
    config: RunConfig,
    plan: Plan,
    model: ModelConfig,
    context: ParallelContext,
    device: torch.device,
    lora: Lora | None = None,
) -> TrainingStep:
    """This rank's part of the model, weights not yet filled, and the step over it; with `lora`, over its adapters."""
    train = config.train
    # Without storage at first: under full sharding the whole part may not fit.
    stage = build_stage(
        model,
        context,
        plan.parts,
        DTYPES[train.precision],
        torch.device("meta"),
        train.recompute,
        train.recompute_layers,
    )
    if lora is not None:
        adapt(stage, lora)
    return TrainingStep(
        stage,
        context,
        config.optimizer,
        micro_batches=plan.micro_batches,
        zero=plan.zero,
        decay_steps=plan.decay_steps,
        schedule=config.parallel.schedule,
        device=device,
    )


def open_loader(
    config: RunConfig, plan: Plan, model: ModelConfig, context: ParallelContext, position: int
) -> BatchLoader:
    """This data rank's micro-batches from sample `position` on."""
    dataset = training_dataset(
        config,
        sequence_length=plan.sequence_length,
        samples=plan.samples,
        vocab_size=model.vocab_size,
        length_unit=plan.length_unit,
    )
    return BatchLoader(
        dataset,
        global_batch=plan.ramp,
        micro_batch=config.train.micro_batch,
        rank=context.data.rank,
        size=context.data.size,
        vocab_size=model.vocab_size,
        position=position,
        document_mask=config.data.document_mask,
        readahead=config.data.readahead,
    )


def _evaluation(
    config: RunConfig | None,
    plan: Plan,
    origin: Origin,
    model: Transformer | ChunkedTransformer,
    tokenizer: Path | None,
    world: World,
) -> Callable[[], Evaluation] | None:
    """A function that evaluates data.validation; None where there is none, or no configuration."""
    if config is None:
        return None
    datasets = validation_sets(
        config,
        sequence_length=plan.sequence_length,
        vocab_size=origin.model.vocab_size,
        length_unit=plan.length_unit,
    )
    if not datasets:
        return None
    metrics = config.evaluate.metrics
    markers = find_markers(metrics, validation_prefixes(config.data), tokenizer)

    def run() -> Evaluation:
        return evaluate_parts(
            model,
            datasets,
            world.exchange,
            micro_batch=config.train.micro_batch,
            micro_batches=plan.micro_batches,
            document_mask=config.data.document_mask,
            metrics=metrics,
            markers=markers,
        )

    return run


def _describe_adapter(config: RunConfig, origin: Origin) -> dict[str, Any] | None:
    if origin.lora is None or origin.base is None:
        return None
    return adapter_state(origin.lora, origin.base, config)


def _describe_run(
    config: RunConfig, plan: Plan, origin: Origin, step: TrainingStep, world: World, progress: Progress
) -> None:
    grid, model = plan.grid, origin.model
    _logger.info(
        "model: %s parameters, %d layers (%s), from %s",
        format_count(model.num_parameters),
        model.num_hidden_layers,
        f"parts of {describe_partition(plan.parts)}" if grid.pipeline > 1 else "one stage",
        origin.description,
    )
    if origin.lora is not None:
        _logger.info(
            "adapters: %s parameters, rank %d, alpha %g, on %s",
            format_count(count_adapters(model, origin.lora) or 0),
            origin.lora.rank,
            origin.lora.alpha,
            ", ".join(origin.lora.targets),
        )
    notice = dropout_notice(origin.huggingface)
    if notice is not None:
        _logger.info("%s", notice)
    _logger.info(
        "grid: tensor %d x %sdata %d x pipeline %d on %d %s%s%s%s; %s; optimizer state %s on rank 0",
        grid.tensor,
        f"context {grid.context} x " if grid.context > 1 else "",
        grid.data,
        grid.pipeline,
        grid.world_size,
        "processes" if world.device.type == "cpu" else "GPUs",
        _describe_pipeline(config) if grid.pipeline > 1 else "",
        ", sequence parallel" if step.context.sequence else "",
        _describe_division(plan),
        config.train.precision,
        format_bytes(step.optimizer.state_bytes),
    )
    batch = plan.ramp.batch_at(progress.consumed_samples)
    _logger.info(
        "steps %d to %d, each %d sequences of %d tokens in %d micro-batches of %d per data rank%s",
        progress.step + 1,
        config.train.steps,
        batch,
        plan.sequence_length,
        batch // (config.train.micro_batch * grid.data),
        config.train.micro_batch,
        _describe_ramp(plan.ramp, progress.consumed_samples),
    )
    if plan.zero == 3 and grid.pipeline > 1:
        _logger.warning(
            "parallel.zero=3 with parallel.pipeline=%d gathers all weights of a stage twice for each of %d "
            "micro-batches; parallel.zero=1 gathers them once a step",
            grid.pipeline,
            plan.micro_batches,
        )
    data = config.data
    extendable = data.order == "stable" or data.samples is not None or data.train == SYNTHETIC
    if data.kind == "instruction":
        extendable = True
    if progress.step == 0 and config.checkpoint.save is not None and not extendable:
        _logger.info("more train.steps later need data.samples or data.order=stable now")


def _describe_ramp(ramp: Ramp, position: int) -> str:
    """What the batch becomes later on."""
    later = [f", {batch} from sample {first:,} on" for first, batch in ramp.stages if first > position]
    return "".join(later)


def _describe_division(plan: Plan) -> str:
    within = f" within {plan.shard} ranks" if plan.shard < plan.grid.data * plan.grid.context else ""
    return f", ZeRO-{plan.zero}{within}" if plan.zero else ""


def _describe_pipeline(config: RunConfig) -> str:
    chunks = f", {config.parallel.chunks} chunks a stage" if config.parallel.chunks > 1 else ""
    return f", {config.parallel.schedule}{chunks}"
