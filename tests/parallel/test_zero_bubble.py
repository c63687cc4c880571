"""What a backward pass in two parts keeps between them: the operands of the products that are left, nothing else."""

from __future__ import annotations

import dataclasses
import gc
from typing import get_args
from unittest.mock import patch

import pytest
import torch

from megatron.config.train import Recompute
from megatron.data.loader import MicroBatch
from megatron.model.config import ModelConfig
from megatron.model.initialize import initialize
from megatron.model.stage import run_micro_batches
from megatron.model.transformer import Transformer
from megatron.parallel.buckets import build_buckets
from megatron.parallel.collectives import Done
from megatron.parallel.gradients import GradientReducer
from megatron.parallel.mesh import Axis, ParallelContext, single_rank
from megatron.parallel.pipeline.schedule import Backward, BackwardInput, BackwardWeight, Forward
from megatron.parallel.weight_gradient import LaterProducts

MODEL = ModelConfig(64, 24, 40, 3, 4, 2, 6)


class Neighbour:
    """The stages around a middle one: they take everything at once, and always have a message of ones."""

    def __init__(self) -> None:
        self.taken: set[int] = set()  # storages

    def send(self, tensor: torch.Tensor, peer: int) -> Done:
        self.taken.add(tensor.untyped_storage().data_ptr())
        return Done()

    def receive(self, tensor: torch.Tensor, peer: int) -> Done:
        tensor.fill_(1.0)
        return Done()


def make_middle_stage(recompute: Recompute, neighbour: Neighbour) -> tuple[Transformer, GradientReducer]:
    """Stage 1 of 3, one layer."""
    axes = {name: Axis(name, 1, 3, (0, 1, 2), neighbour) for name in ("pp", "forward", "backward")}
    return make(dataclasses.replace(single_rank(), **axes), recompute)


def make(context: ParallelContext, recompute: Recompute = "none") -> tuple[Transformer, GradientReducer]:
    model = Transformer(MODEL, context, torch.float64, recompute=recompute)
    initialize(model, MODEL, 5)
    buckets = build_buckets(model, context.shard, zero=0, gradient_dtype=torch.float64, bucket_elements=2000)
    return model, GradientReducer(buckets, context)


def batch(count: int) -> list[MicroBatch]:
    tokens = torch.randint(0, 64, (count, 2, 17), generator=torch.Generator().manual_seed(3))
    return [MicroBatch(sample[:, :-1], sample[:, 1:]) for sample in tokens]


def storages() -> dict[int, int]:
    """Address → bytes of every storage that some tensor in Python holds, but for single numbers."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and thing.numel() > 1]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def test_both_parts_give_what_the_whole_gives() -> None:
    model, reducer = make(single_rank())
    micro_batches = batch(3)
    gradients = []
    whole = [action(number) for number in range(3) for action in (Forward, Backward)]
    first = [action(number) for number in range(3) for action in (Forward, BackwardInput)]
    for actions in (whole, [*first, *map(BackwardWeight, range(3))]):
        reducer.begin(3)
        run_micro_batches(model, micro_batches, actions, reducer.later)
        reducer.finish()
        gradients.append([bucket.gradients.clone() for bucket in reducer.buckets])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_only_operands_of_products_wait(recompute: Recompute) -> None:
    neighbour = Neighbour()
    model, reducer = make_middle_stage(recompute, neighbour)
    micro_batches = batch(1)
    # What the model and the step hold at any time: seen in a first step.
    actions = [Forward(0), BackwardInput(0), BackwardWeight(0)]
    reducer.begin(1)
    run_micro_batches(model, micro_batches, actions, reducer.later)
    before = storages()
    waiting: dict[int, int] = {}
    run = LaterProducts.run

    def look(later: LaterProducts, place: tuple[int, int]) -> None:
        waiting.update(storages())
        for product in later._waiting[place]:
            cells = [cell.cell_contents for cell in product.__closure__ or ()]
            operands.update(cell.untyped_storage().data_ptr() for cell in cells if isinstance(cell, torch.Tensor))
        run(later, place)

    operands: set[int] = set()
    neighbour.taken.clear()
    reducer.begin(1)
    with patch.object(LaterProducts, "run", look):
        run_micro_batches(model, micro_batches, actions, reducer.later)
    # The last messages are kept too, until the next ones go the same way.
    assert operands and waiting.keys() <= before.keys() | operands | neighbour.taken
    assert set(storages()) <= set(before), "something outlives the step"
