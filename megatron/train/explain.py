"""What a step of a run reads on a rank, and how much of each source was read up to a step.

Nothing is trained and no process is started: from the configuration alone, the position of a step follows from the
ramp of the batch, the rank's samples from the grid, and what they are from the order.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.manager import newest_checkpoint
from megatron.checkpoint.source import open_stored
from megatron.config.run import RunConfig
from megatron.config.values import show
from megatron.data.dataset import Dataset
from megatron.data.explain import Origin, origin_of
from megatron.data.ledger import Account, ledger
from megatron.data.loader import BatchLoader, MicroBatch, MicroBatchDataset, indices_of_rank
from megatron.model.config import ModelConfig
from megatron.train.build import Plan, make_plan
from megatron.train.checkpoints import check_resume
from megatron.train.datasets import describe_order, training_dataset
from megatron.utils.errors import ConfigError

_MOST_SAMPLES = 10**15


@dataclass(frozen=True)
class Row:
    """One row of a micro-batch: which sample of the order it is, a digest of its tokens and labels as the trainer gets
    them, where it comes from (None for what is not stored documents), and that in words."""

    micro_batch: int
    row: int
    sample: int
    sha256: str
    origin: Origin | None
    source: str


@dataclass(frozen=True)
class Explanation:
    """Step `step` of a run on data rank `data_rank` of `data_ranks`, which begins at sample `position` of the order."""

    step: int
    data_rank: int
    data_ranks: int
    position: int
    global_batch: int
    rows: tuple[Row, ...]


def explain_step(
    config: RunConfig, model: ModelConfig, *, processes: int | None, rank: int, step: int, position: int | None = None
) -> Explanation:
    """What global rank `rank` of `processes` (None: as many as the run's newest checkpoint was saved by) reads in step
    `step` (from 1). `position` is the first sample of the step, where the configuration does not tell: a run whose
    batch was changed on the way.

    Raises ConfigError for what is not a rank or a step, or a configuration that its newest checkpoint contradicts.
    """
    count = _processes_of(config) if processes is None else processes
    if count < 1:
        raise ConfigError(f"--processes {count} is not a number of processes; use 1 or more")
    _check_position(position)
    if not 0 <= rank < count:
        raise ConfigError(f"there is no rank {rank} of {count} processes; use 0 to {count - 1}")
    plan = make_plan(config, model, count)
    _check_step(config, step, first=1)
    _check_checkpoint(config, plan, position_is_known=position is not None)
    _, _, data_rank, _ = plan.grid.coordinates(rank)
    start = plan.ramp.position_after(step - 1) if position is None else position
    dataset = _dataset(config, plan, model)
    with BatchLoader(
        dataset,
        global_batch=plan.ramp,
        micro_batch=config.train.micro_batch,
        rank=data_rank,
        size=plan.grid.data,
        vocab_size=model.vocab_size,
        position=start,
    ) as loader:
        batch = loader.next_batch()
    global_batch = plan.ramp.batch_at(start)
    indices = indices_of_rank(start, global_batch, config.train.micro_batch, data_rank, plan.grid.data)
    rows = tuple(
        _row(dataset, micro_batch, number, row, sample)
        for number, (micro_batch, samples) in enumerate(zip(batch, indices.tolist(), strict=True))
        for row, sample in enumerate(samples)
    )
    return Explanation(step, data_rank, plan.grid.data, start, global_batch, rows)


def ledger_after(
    config: RunConfig, model: ModelConfig, *, step: int, position: int | None = None
) -> tuple[int, list[Account]]:
    """(samples, what was read of each source) after `step` steps of a run, or after `position` samples.

    Raises ConfigError for a step that the run does not have, or a configuration that its newest checkpoint contradicts.
    """
    _check_position(position)
    _check_step(config, step, first=0)
    plan = make_plan(config, model, _smallest_world(config))
    _check_checkpoint(config, plan, position_is_known=position is not None)
    position = plan.ramp.position_after(step) if position is None else position
    dataset = _dataset(config, plan, model)
    if position > len(dataset):
        raise ConfigError(f"--position {position} is behind the end of the data, which have {len(dataset):,} samples")
    return position, [] if isinstance(dataset, MicroBatchDataset) else ledger(dataset, position)


def digest_of_row(batch: MicroBatch, row: int) -> str:
    """SHA-256 of the tokens and then the labels of a row, as 64-bit little-endian numbers."""
    digest = hashlib.sha256()
    for values in (batch.tokens, batch.labels):
        digest.update(values[row].numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def to_json(explanation: Explanation) -> dict[str, Any]:
    """The explanation as JSON values."""
    return {
        "step": explanation.step,
        "data_rank": explanation.data_rank,
        "data_ranks": explanation.data_ranks,
        "position": explanation.position,
        "global_batch": explanation.global_batch,
        "rows": [_row_to_json(row) for row in explanation.rows],
    }


def _row_to_json(row: Row) -> dict[str, Any]:
    known: dict[str, Any] = {
        "micro_batch": row.micro_batch,
        "row": row.row,
        "sample": row.sample,
        "sha256": row.sha256,
        "source": row.source,
    }
    if row.origin is not None:
        known |= {"prefix": row.origin.prefix, "number": row.origin.number, "epoch": row.origin.epoch}
        known["excerpts"] = [
            {
                "document": excerpt.document,
                "sequence": excerpt.sequence,
                "start": excerpt.start,
                "stop": excerpt.stop,
                "file": None if line is None else line[0],
                "line": None if line is None else line[1],
            }
            for excerpt, line in row.origin.excerpts
        ]
    return known


def _row(dataset: Dataset | MicroBatchDataset, batch: MicroBatch, number: int, row: int, sample: int) -> Row:
    origin = None if isinstance(dataset, MicroBatchDataset) else origin_of(dataset, sample)
    return Row(number, row, sample, digest_of_row(batch, row), origin, dataset.source(sample))


def _dataset(config: RunConfig, plan: Plan, model: ModelConfig) -> Dataset | MicroBatchDataset:
    return training_dataset(
        config,
        sequence_length=plan.sequence_length,
        samples=plan.samples,
        vocab_size=model.vocab_size,
        length_unit=plan.length_unit,
    )


def _check_step(config: RunConfig, step: int, first: int) -> None:
    last = config.train.steps
    if not first <= step <= last:
        raise ConfigError(f"there is no step {step}: the steps of the run are {first} to {last} (train.steps={last})")


def _check_position(position: int | None) -> None:
    if position is not None and position < 0:
        raise ConfigError(f"--position {position} is negative; samples are counted from 0")
    if position is not None and position > _MOST_SAMPLES:
        raise ConfigError(f"--position {position} is more samples than any run reads; use {_MOST_SAMPLES} or fewer")


def _newest(config: RunConfig) -> Path | None:
    return None if config.checkpoint.save is None else newest_checkpoint(Path(config.checkpoint.save))


def _processes_of(config: RunConfig) -> int:
    """How many processes saved the run's newest checkpoint."""
    newest = _newest(config)
    if newest is None:
        raise ConfigError(
            "how many processes the run has is not known, since there is no checkpoint in checkpoint.save; "
            "say it with --processes"
        )
    with open_stored(newest) as source:
        grid = (source.state or {})["grid"]
    return int(grid["tensor"] * grid["context"] * grid["pipeline"] * grid["data"])


def _check_checkpoint(config: RunConfig, plan: Plan, *, position_is_known: bool) -> None:
    """Raise ConfigError where the run's newest checkpoint has another order of samples than the configuration, or,
    where that is to say it, was at another position."""
    newest = _newest(config)
    if newest is None:
        return
    with open_stored(newest) as source:
        order = describe_order(config, sequence_length=plan.sequence_length, samples=plan.samples)
        check_resume(config, source, order)
        state = source.state or {}
    step, samples = int(state.get("step", 0)), int(state.get("consumed_samples", 0))
    expected = plan.ramp.position_after(step)
    if not position_is_known and samples != expected:
        raise ConfigError(
            f"{newest} had read {samples:,} samples after step {step:,}, but by train.global_batch="
            f"{show(config.train.global_batch)} these would have been {expected:,}: the configuration is not that of "
            "the run, or its batch was changed on the way. Give the run's, or name the samples with --position"
        )


def _smallest_world(config: RunConfig) -> int:
    """One data rank: what was read of a source is the same on any grid."""
    return config.parallel.tensor * config.parallel.context * config.parallel.pipeline
