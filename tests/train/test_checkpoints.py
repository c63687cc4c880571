"""Starting from a source: every element of weights, masters and moments has a defined value; and saving again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.convert import convert
from megatron.checkpoint.manager import whole_checkpoints
from megatron.checkpoint.source import open_source
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig
from megatron.config.model import ModelSettings
from megatron.config.optimizer import OptimizerConfig
from megatron.config.run import RunConfig
from megatron.config.train import TrainConfig
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank
from megatron.parallel.world import World
from megatron.train.build import build_trainer
from megatron.train.checkpoints import start_from
from megatron.train.origin import Origin
from megatron.train.step import TrainingStep

from .conftest import MODEL, random_batch

PADDED = replace(MODEL, vocab_size=50)  # 14 rows of padding


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """What `torch.empty` gives is filled with NaN, so that whatever is never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("fresh_memory_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["folder", "random"])
@pytest.mark.parametrize("tied", [False, True])
def test_nothing_is_left_undefined(
    huggingface_folder: Callable[..., Path], dtype: torch.dtype, source: str, tied: bool
) -> None:
    config = replace(PADDED, tie_word_embeddings=tied)
    step = TrainingStep(
        Transformer(config, single_rank(), dtype),
        single_rank(),
        OptimizerConfig(learning_rate=1e-2),
        micro_batches=1,
        zero=0,
        decay_steps=5,
    )
    opened = open_source(huggingface_folder(model=config)) if source == "folder" else None
    start_from(Origin(opened, False, config, config.to_huggingface()), step, seed=1)
    (batch,) = random_batch(1)
    batch.tokens.clamp_(max=49), batch.labels.clamp_(max=49)
    for number in (1, 2, 3):
        outcome = step([batch], number)
        assert torch.isfinite(outcome.loss) and torch.isfinite(outcome.grad_norm), number
    assert step.optimizer.updates == 3
    head = step.model.head.weight
    assert (head[50:] == 0).all() and head[:50].isfinite().all(), "padding rows stay zero"


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_resumed_run_outlives_the_checkpoint_it_came_from(
    world: World, huggingface_folder: Callable[..., Path], tmp_path: Path, keep_last: int
) -> None:
    source, save = huggingface_folder(), tmp_path / "save"
    (source / "tokenizer.model").write_bytes(b"pieces")
    (source / "LICENSE").write_text("free")
    config = RunConfig(
        model=ModelSettings(init_from=str(source)),
        data=DataConfig(train="synthetic", sequence_length=8),
        train=TrainConfig(steps=1, global_batch=1, precision="fp32"),
        checkpoint=CheckpointConfig(save=str(save)),
    )
    with build_trainer(config, world) as trainer:
        trainer.fit()
    checkpoint = replace(config.checkpoint, interval=1, keep_last=keep_last)
    with build_trainer(replace(config, train=replace(config.train, steps=4), checkpoint=checkpoint), world) as trainer:
        trainer.fit()
    kept = whole_checkpoints(save)
    assert [step for step, _ in kept] == [1, 2, 3, 4][-keep_last:]
    for _, folder in kept:
        assert (folder / "tokenizer.model").read_bytes() == b"pieces"
        assert (folder / "LICENSE").read_text() == "free"


def test_a_checkpoint_says_its_configuration_in_the_words_of_transformers_4_and_5(
    world: World, huggingface_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = huggingface_folder(model=replace(MODEL, rope_theta=5e5))
    content = json.loads((source / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling", "torch_dtype"):  # what transformers 4 reads
        content.pop(name, None)
    content |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "float32"}
    (source / "config.json").write_text(json.dumps(content))
    config = RunConfig(
        model=ModelSettings(init_from=str(source)),
        data=DataConfig(train="synthetic", sequence_length=8),
        train=TrainConfig(steps=1, global_batch=1, precision="bf16"),
        checkpoint=CheckpointConfig(save=str(tmp_path / "save")),
    )
    with build_trainer(config, world) as trainer:
        trainer.fit()
    convert(tmp_path / "save", tmp_path / "export")
    for folder in (tmp_path / "save" / "step_0000001", tmp_path / "export"):
        written = json.loads((folder / "config.json").read_text())
        assert (written["rope_theta"], written["rope_scaling"], written["rope_parameters"]) == (
            5e5,
            None,
            {"rope_type": "default", "rope_theta": 5e5},
        )
        assert written["torch_dtype"] == written["dtype"] == "bfloat16"
        assert {name: written[name] for name in content if name not in ("rope_parameters", "dtype")} == {
            name: content[name] for name in content if name not in ("rope_parameters", "dtype")
        }
