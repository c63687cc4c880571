"""What follows from a configuration that leaves values open: the plan of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.convert import Format, convert
from megatron.config.batches import Ramp
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig
from megatron.config.log import LogConfig
from megatron.config.model import ModelSettings
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig
from megatron.config.train import TrainConfig
from megatron.data.indexed import IndexedWriter
from megatron.parallel.mesh import Grid
from megatron.parallel.pipeline.partition import cut
from megatron.parallel.world import World
from megatron.train.build import Plan, build_trainer, make_plan
from megatron.utils.errors import ConfigError

from .conftest import MODEL

LONGEST = MODEL.max_position_embeddings


@pytest.mark.parametrize("to", ["native", "huggingface"])
def test_a_model_is_no_folder_for_checkpoints(
    world: World, huggingface_folder: Callable[..., Path], tmp_path: Path, to: Format
) -> None:
    """Saved there, they would hide behind the model, which is what every reader finds first."""
    convert(huggingface_folder(), tmp_path / "model", to=to)
    before = sorted(tmp_path.rglob("*"))
    config = RunConfig(
        model=ModelSettings(init_from=str(tmp_path / "model")),
        data=DataConfig(train="synthetic", sequence_length=8),
        checkpoint=CheckpointConfig(save=str(tmp_path / "model")),
    )
    with pytest.raises(ConfigError, match=r"is the folder of a model .*model\.init_from"), build_trainer(config, world):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_another_run_in_the_same_folder_erases_nothing(world: World, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24}
    config = RunConfig(
        model=ModelSettings(**sizes, num_hidden_layers=1, num_attention_heads=2),
        data=DataConfig(train="synthetic", sequence_length=8),
        train=TrainConfig(steps=2, global_batch=1, precision="fp32"),
        log=LogConfig(dir=str(tmp_path), interval=1),
        checkpoint=CheckpointConfig(save=str(tmp_path / "save")),
    )
    for _ in range(2):  # once anew, once resumed: nothing is to be done
        with build_trainer(config, world) as trainer:
            trainer.fit()
        assert sorted(path.name for path in tmp_path.glob("*.*")) == ["config.yaml", "metrics.jsonl"]
    first = (tmp_path / "metrics.jsonl").read_text()
    assert first.count("\n") == 2
    with build_trainer(replace(config, checkpoint=CheckpointConfig()), world) as trainer:
        trainer.fit()
    assert (tmp_path / "metrics-1.jsonl").read_text() == first
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_a_finished_run_says_that_and_nothing_of_steps_to_come(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24}
    config = RunConfig(
        model=ModelSettings(**sizes, num_hidden_layers=1, num_attention_heads=2),
        data=DataConfig(train="synthetic", sequence_length=8),
        train=TrainConfig(steps=3, global_batch=1, precision="fp32"),
        checkpoint=CheckpointConfig(save=str(tmp_path / "save")),
    )
    with build_trainer(config, world) as trainer:
        trainer.fit()
    caplog.clear()  # an earlier test may have turned messages on
    shorter = replace(config, train=replace(config.train, steps=2))
    with caplog.at_level("INFO", "megatron.train"), build_trainer(shorter, world) as trainer:
        trainer.fit()
    assert caplog.messages[-1] == "nothing to do: step 3 is done and train.steps=2"
    assert not any("steps 4 to 2" in line or line.startswith(("model:", "grid:")) for line in caplog.messages)


@pytest.mark.parametrize(
    ("data", "save", "said"),
    [({}, True, True), ({"samples": 9}, True, False), ({"order": "stable"}, True, False), ({}, False, False)],
)
def test_what_a_run_needs_to_be_extended_is_said_while_it_can_be_set(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, data: dict[str, Any], save: bool, said: bool
) -> None:
    with IndexedWriter(tmp_path / "pair", "uint16") as writer:
        writer.add_sequence(list(range(60)))
        writer.end_document()
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24}
    config = RunConfig(
        model=ModelSettings(**sizes, num_hidden_layers=1, num_attention_heads=2),
        data=DataConfig(train=str(tmp_path / "pair"), sequence_length=8, **data),
        train=TrainConfig(steps=1, global_batch=1, precision="fp32"),
        checkpoint=CheckpointConfig(save=str(tmp_path / "save") if save else None),
    )
    with caplog.at_level("INFO", "megatron.train"), build_trainer(config, world):
        pass
    assert any("data.order=stable" in line for line in caplog.messages) is said


def plan(world_size: int, **sections: dict[str, Any]) -> Plan:
    config = RunConfig(
        parallel=ParallelConfig(**sections.get("parallel", {})),
        data=DataConfig(**{"train": "synthetic", **sections.get("data", {})}),
        optimizer=OptimizerConfig(**sections.get("optimizer", {})),
        train=TrainConfig(**{"steps": 7, "global_batch": 24, "micro_batch": 2, **sections.get("train", {})}),
    )
    return make_plan(config, MODEL, world_size)


def test_one_process_and_nothing_stated() -> None:
    assert plan(1) == Plan(
        grid=Grid(),
        sequence_length=LONGEST,
        sequence_parallel=False,
        zero=0,
        shard=1,
        ramp=Ramp(((0, 24),)),
        samples=7 * 24,
        decay_steps=7,
        micro_batches=12,
        parts=tuple(cut(MODEL.num_hidden_layers, 1)),
    )


def test_what_is_stated_is_taken() -> None:
    found = plan(
        4,
        parallel={"tensor": 2, "sequence": False, "zero": 0},
        data={"sequence_length": 12, "samples": 1000},
        optimizer={"decay_steps": 5},
    )
    assert found == Plan(
        grid=Grid(tensor=2, data=2),
        sequence_length=12,
        sequence_parallel=False,
        zero=0,
        shard=1,
        ramp=Ramp(((0, 24),)),
        samples=1000,
        decay_steps=5,
        micro_batches=6,
        parts=tuple(cut(MODEL.num_hidden_layers, 1)),
    )


def test_a_ramp_is_planned_by_its_largest_batch_and_counts_its_samples() -> None:
    found = plan(2, data={"sequence_length": 10}, train={"global_batch": ((0, 4), (200, 24), (1000, 8))})
    assert found.micro_batches == 6
    assert found.ramp == Ramp(((0, 4), (20, 24), (100, 8)))
    assert found.samples == 5 * 4 + 2 * 24, "of seven steps"


@pytest.mark.parametrize(
    ("world_size", "tensor", "pipeline", "zero", "micro_batches"),
    [(1, 1, 1, 0, 12), (2, 1, 1, 1, 6), (2, 2, 1, 0, 12), (2, 1, 2, 0, 12), (4, 2, 1, 1, 6), (8, 2, 2, 1, 6)],
)
def test_optimizer_state_is_sharded_where_there_are_data_ranks(
    world_size: int, tensor: int, pipeline: int, zero: int, micro_batches: int
) -> None:
    parallel = {"tensor": tensor, "pipeline": pipeline}
    found = plan(world_size, parallel=parallel)
    assert (found.zero, found.micro_batches) == (zero, micro_batches)
    assert found.grid == Grid(tensor, 1, world_size // (tensor * pipeline), pipeline)
    ranks = found.grid.data
    assert found.shard == ranks
    for stated in (0, 1, 3):
        taken = plan(world_size, parallel={**parallel, "zero": stated})
        # One rank has nobody to divide anything among.
        assert (taken.zero, taken.shard) == ((stated, ranks) if stated and ranks > 1 else (0, 1))


def test_what_zero_divides_may_be_divided_within_groups() -> None:
    for zero in (1, 3):
        within = {within: plan(4, parallel={"zero": zero, "zero_within": within}) for within in (1, 2, 4)}
        assert {key: (found.zero, found.shard) for key, found in within.items()} == {
            1: (0, 1),
            2: (zero, 2),
            4: (zero, 4),
        }
    assert plan(4, parallel={"context": 2, "zero_within": 4}).shard == 4, "parts of sequences count too"


@pytest.mark.parametrize(("tensor", "on"), [(1, False), (2, True), (4, True)])
def test_sequence_parallelism_comes_with_tensor_parallelism(tensor: int, on: bool) -> None:
    assert plan(4, parallel={"tensor": tensor}).sequence_parallel is on
    assert plan(4, parallel={"tensor": tensor, "sequence": False}).sequence_parallel is False


@pytest.mark.parametrize(("global_batch", "micro_batch", "expected"), [(24, 1, 12), (24, 3, 4), (24, 12, 1), (8, 2, 2)])
def test_micro_batches_are_those_of_one_data_rank(global_batch: int, micro_batch: int, expected: int) -> None:
    found = plan(4, parallel={"tensor": 2}, train={"global_batch": global_batch, "micro_batch": micro_batch})
    assert found.micro_batches == expected
    assert found.samples == 7 * global_batch


def test_what_cannot_be_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 processes"):
        plan(3, parallel={"tensor": 2})
    with pytest.raises(ConfigError, match=r"train\.global_batch=24"):
        plan(4, train={"micro_batch": 4})
    with pytest.raises(ConfigError, match=f"max_position_embeddings={LONGEST}"):
        plan(1, data={"sequence_length": LONGEST + 1})
