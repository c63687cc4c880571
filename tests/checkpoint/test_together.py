"""Reading by all ranks of a stage together: every byte once, whatever grid wants it."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import together
from megatron.checkpoint.convert import convert
from megatron.checkpoint.source import Source, open_source
from megatron.checkpoint.together import Wanted, read_together
from megatron.config.optimizer import OptimizerConfig
from megatron.model.config import ModelConfig
from megatron.model.specs import rank_specs
from megatron.model.transformer import Transformer
from megatron.parallel.collectives import Done
from megatron.parallel.layout import Region
from megatron.parallel.mesh import Axis, single_rank
from megatron.train.checkpoints import start_from
from megatron.train.origin import Origin
from megatron.train.step import TrainingStep
from megatron.utils.errors import CheckpointError

from .conftest import CONFIG, partition
from .test_convert import random_weights, write_model

MODEL = ModelConfig.from_huggingface(CONFIG)
TENSOR, GRAD, PIPELINE = 2, 3, 3


class Meeting:
    """The collectives of a group of threads."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.tensors: list[Any] = [None] * size

    def member(self, rank: int) -> Any:
        return _Member(self, rank)


class _Member:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.meeting.tensors[self.rank] = tensor.clone()
        self.meeting.barrier.wait()
        found = list(self.meeting.tensors)
        self.meeting.barrier.wait()
        return found

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> Done:
        output.copy_(torch.cat(self._exchange(tensor)))
        return Done()

    def all_reduce(self, tensor: torch.Tensor, maximum: bool = False) -> Done:
        assert maximum
        tensor.copy_(torch.stack(self._exchange(tensor)).amax(0))
        return Done()


def run_grid(work: Callable[[int, int, list[Axis]], Any]) -> list[Any]:
    """`work(tensor rank, grad rank, axes)` in a thread per rank; returns each one's result or exception."""
    tensor_groups = [Meeting(TENSOR) for _ in range(GRAD)]
    grad_groups = [Meeting(GRAD) for _ in range(TENSOR)]
    results: list[Any] = [None] * (TENSOR * GRAD)

    def rank_thread(tensor: int, grad: int) -> None:
        axes = [
            Axis("tp", tensor, TENSOR, tuple(range(TENSOR)), tensor_groups[grad].member(tensor)),
            Axis("grad", grad, GRAD, tuple(range(GRAD)), grad_groups[tensor].member(grad)),
        ]
        try:
            results[tensor * GRAD + grad] = work(tensor, grad, axes)
        except Exception as error:
            results[tensor * GRAD + grad] = error

    threads = [threading.Thread(target=rank_thread, args=(t, g)) for t in range(TENSOR) for g in range(GRAD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def wanted_of(tensor: int, grad: int, stage: int, dtype: torch.dtype) -> list[tuple[Region, torch.Tensor]]:
    """What a rank of a stage holds, in odd pieces: all of it, or a share of it over grad."""
    specs = rank_specs(MODEL, tensor=TENSOR, pipeline=PIPELINE, tensor_rank=tensor, pipeline_rank=stage)
    chance = random.Random(stage)
    parts = [part for spec in specs.values() for piece in spec.pieces for part in partition(piece.region, 2, chance)]
    return [
        (part, torch.full(part.size, torch.nan, dtype=dtype)) for part in parts if grad < 2 or chance.random() < 0.5
    ]


def check(source: Source, wanted: Wanted) -> None:
    for region, out in wanted:
        expected = torch.empty(region.size, dtype=out.dtype)
        source.read(region, expected)
        assert torch.equal(out, expected), region


@pytest.mark.parametrize("form", ["hf", "native", "megatron-llm"])
@pytest.mark.parametrize("block_bytes", [200, 4096, 2**20])
def test_each_byte_is_read_once_whatever_the_grid(tmp_path: Path, monkeypatch, form: str, block_bytes: int) -> None:
    folder = write_model(tmp_path / "model", CONFIG, random_weights(CONFIG))
    if form != "hf":
        convert(folder, tmp_path / form, to=form, tensor=2, pipeline=3)
        folder = tmp_path / form
    monkeypatch.setattr(together, "_LEAST_BYTES", block_bytes)
    monkeypatch.setattr(together, "_BLOCK_BYTES", block_bytes)
    with open_source(folder) as source:
        needed = sum(stored.size_bytes for stored in source.index["weights"].values())
        requests: list[int] = []
        genuine = os.preadv

        def counting(descriptor: int, buffers: list, offset: int) -> int:
            requests.append(sum(len(buffer) for buffer in buffers))
            return genuine(descriptor, buffers, offset)

        def work(tensor: int, grad: int, axes: list[Axis], stage: int) -> Wanted:
            own = source.again()
            for name, shape in own.shapes().items():  # opens every file, which reads its header
                own.read(Region.whole(name, shape), torch.empty(shape))
            wanted = wanted_of(tensor, grad, stage, torch.float32)
            barrier.wait()
            read_together(own, wanted, axes, lambda name: "weights")
            return wanted

        barrier = threading.Barrier(TENSOR * GRAD, lambda: monkeypatch.setattr(os, "preadv", counting))
        results = []
        for stage in range(PIPELINE):
            results += run_grid(lambda tensor, grad, axes, at=stage: work(tensor, grad, axes, at))
            monkeypatch.setattr(os, "preadv", genuine)
        for wanted in results:
            assert not isinstance(wanted, Exception), wanted
            check(source, wanted)
        # Interleaved rows are read through twice, once for each half.
        assert sum(requests) == needed if form != "megatron-llm" else needed < sum(requests) < 1.6 * needed


def test_a_rank_that_cannot_read_lets_the_others_finish(tmp_path: Path, monkeypatch) -> None:
    folder = write_model(tmp_path / "model", CONFIG, random_weights(CONFIG))
    monkeypatch.setattr(together, "_LEAST_BYTES", 1000)
    monkeypatch.setattr(together, "_BLOCK_BYTES", 1000)
    with open_source(folder) as source:

        def work(tensor: int, grad: int, axes: list[Axis]) -> str:
            own = source.again()
            if (tensor, grad) == (1, 0):

                def broken(*arguments: object) -> None:
                    raise CheckpointError("the disk is gone")

                own.read = broken  # type: ignore[method-assign]
            read_together(own, wanted_of(tensor, grad, 0, torch.float32), axes, lambda name: "weights")
            return "finished"

        results = run_grid(work)
    assert [str(result) for result in results] == ["finished"] * 3 + ["the disk is gone"] + ["finished"] * 2


def test_a_start_reads_each_byte_once_and_masters_keep_the_precision(tmp_path: Path, monkeypatch) -> None:
    """A float32 model trained in bf16: weights and masters come from one reading."""
    weights = random_weights(CONFIG, torch.float32)
    folder = write_model(tmp_path / "model", CONFIG, weights)
    model = Transformer(MODEL, single_rank(), torch.bfloat16)
    options = OptimizerConfig(learning_rate=1e-2)
    step = TrainingStep(model, single_rank(), options, micro_batches=1, zero=0, decay_steps=5)
    requests: list[int] = []
    genuine = os.preadv
    with open_source(folder) as source:
        origin = Origin(source, False, MODEL, CONFIG)

        def counting(descriptor: int, buffers: list, offset: int) -> int:
            requests.append(sum(len(buffer) for buffer in buffers))
            return genuine(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", counting)
        start_from(origin, step, seed=1)
    assert sum(requests) <= 1.05 * sum(tensor.nbytes for tensor in weights.values()) + 4096  # the header
    for region, view in step.weight_regions():
        assert torch.equal(view, weights[region.name][region.slices].bfloat16()), region
    for region, view in step.optimizer.state_regions("master"):
        assert torch.equal(view, weights[region.name][region.slices]), region
