"""What a run may change about its data when it is resumed, and what it reports of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import BlendFrom, DataConfig
from megatron.config.evaluate import EvaluateConfig
from megatron.config.log import LogConfig
from megatron.config.model import ModelSettings
from megatron.config.run import RunConfig
from megatron.config.train import TrainConfig
from megatron.data.indexed import IndexedWriter
from megatron.parallel.world import World
from megatron.train.build import build_trainer
from megatron.utils.errors import ConfigError


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run of 3 steps, of 2, 2 and 4 samples of 8 tokens, that leaves its first blend after 32 tokens."""
    for name, size, stride in (("a", 60, 1), ("b", 90, 5)):
        with IndexedWriter(tmp_path / name, "uint16") as writer:
            writer.add_sequence([stride * number % 64 for number in range(size)])
            writer.end_document()
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24}
    return RunConfig(
        model=ModelSettings(**sizes, num_hidden_layers=1, num_attention_heads=2),
        data=DataConfig(
            train=stages(tmp_path, 1.0, 1.0),
            validation=((None, str(tmp_path / "a")), (None, str(tmp_path / "b"))),
            sequence_length=8,
            order="stable",
        ),
        train=TrainConfig(steps=3, global_batch=((0, 2), (32, 4)), precision="fp32"),
        checkpoint=CheckpointConfig(save=str(tmp_path / "save")),
        evaluate=EvaluateConfig(interval=3, batches=2),
        log=LogConfig(dir=str(tmp_path / "log"), interval=1),
    )


def stages(folder: Path, first: float, third: float) -> tuple[BlendFrom, ...]:
    """Three blends, of which 8 samples (64 tokens) read of the first two."""
    a, b = str(folder / "a"), str(folder / "b")
    return (
        BlendFrom(0, ((first, a), (1.0, b))),
        BlendFrom(32, ((1.0, a), (3.0, b))),
        BlendFrom(64, ((third, a), (1.0, b))),
    )


def train(config: RunConfig, world: World) -> list[dict[str, Any]]:
    with build_trainer(config, world) as trainer:
        trainer.fit()
    return [json.loads(line) for line in (Path(config.log.dir or "") / "metrics.jsonl").read_text().splitlines()]


def test_figures_of_each_source(config: RunConfig, world: World) -> None:
    lines = train(config, world)
    assert [line["consumed_tokens"] for line in lines] == [16, 32, 64]
    assert [(line["tokens/a"], line["tokens/b"]) for line in lines] == [(8, 8), (16, 16), (24, 40)]
    assert lines[-1]["epochs/a"] == 3 / 7 and lines[-1]["epochs/b"] == 5 / 11  # of windows
    last = lines[-1]
    # Four windows of each, the same number of predictions: so the mean of both is the whole.
    assert last["validation_loss"] == pytest.approx((last["validation_loss/a"] + last["validation_loss/b"]) / 2)
    assert last["validation_loss/a"] != last["validation_loss/b"]


def test_blends_to_come_may_be_changed_but_not_those_that_began(
    config: RunConfig, world: World, tmp_path: Path
) -> None:
    train(config, world)
    longer = replace(config.train, steps=5)
    with pytest.raises(ConfigError, match=r"another order of samples: data\.train was"):
        train(replace(config, train=longer, data=replace(config.data, train=stages(tmp_path, 2.0, 1.0))), world)
    lines = train(replace(config, train=longer, data=replace(config.data, train=stages(tmp_path, 1.0, 7.0))), world)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert (lines[-1]["tokens/a"], lines[-1]["tokens/b"]) == (24 + 7 * 8, 40 + 8)


def test_a_blend_may_be_followed_by_another_later_on(config: RunConfig, world: World, tmp_path: Path) -> None:
    first, *_ = stages(tmp_path, 1.0, 1.0)
    plain = replace(config, data=replace(config.data, train=first.blend))
    train(plain, world)
    following = (first, BlendFrom(64, ((1.0, str(tmp_path / "b")),)))
    lines = train(
        replace(plain, train=replace(config.train, steps=4), data=replace(config.data, train=following)), world
    )
    assert (lines[-1]["tokens/a"], lines[-1]["tokens/b"]) == (32, 32 + 32)


def test_another_ramp_from_now_on(config: RunConfig, world: World) -> None:
    """The position is all there is: what was read is not read again, whatever the batch is now."""
    train(config, world)
    changed = replace(config.train, steps=5, global_batch=3)
    lines = train(replace(config, train=changed), world)
    assert [line["consumed_tokens"] for line in lines] == [16, 32, 64, 88, 112]


def test_megatrons_order_of_blends_cannot_be_changed(config: RunConfig, world: World, tmp_path: Path) -> None:
    config = replace(config, data=replace(config.data, order="megatron", samples=100))
    train(config, world)
    longer = replace(config.train, steps=5)
    with pytest.raises(ConfigError, match=r"another order of samples: data\.train was"):
        train(replace(config, train=longer, data=replace(config.data, train=stages(tmp_path, 1.0, 7.0))), world)
