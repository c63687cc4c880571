"""Recomputing some layers of a stage: the same gradients to the bit, and memory between that of none and of all."""

from __future__ import annotations

import pytest
import torch

from megatron.config.train import Recompute
from megatron.model.config import ModelConfig
from megatron.model.initialize import initialize
from megatron.model.transformer import build_stage
from megatron.parallel.mesh import Grid, ParallelContext, describe, single_rank
from megatron.parallel.pipeline.partition import cut

LAYERS = 4
MODEL = ModelConfig(96, 64, 176, LAYERS, 4, 2, 16, initializer_range=0.2)


def run(recompute: Recompute, some: int | None) -> tuple[torch.Tensor, list[torch.Tensor | None], int]:
    """(loss, every gradient, bytes that autograd keeps)."""
    context = single_rank()
    model = build_stage(MODEL, context, cut(LAYERS, 1), torch.float32, "cpu", recompute, some)
    initialize(model, MODEL, 3)
    tokens = torch.randint(0, 96, (2, 65), generator=torch.Generator().manual_seed(0))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens[:, :-1], labels=tokens[:, 1:])
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()], sum(kept.values())


def test_gradients_are_the_same_bits_and_each_layer_saves_memory() -> None:
    loss, gradients, kept = run("none", None)
    for some in (1, 2, LAYERS, None):
        again, gradients_again, kept_again = run("full", some)
        assert torch.equal(loss, again)
        for one, other in zip(gradients, gradients_again, strict=True):
            assert one is not None and other is not None and one.abs().max() > 0 and torch.equal(one, other)
        if some == LAYERS or some is None:
            assert kept_again <= kept and (some is not None or kept_again == kept)
        else:
            assert kept_again < kept - 64 * 2 * 64 * 4, "a layer more should keep less"
        kept = kept_again


def kinds(context: ParallelContext, chunks: int, some: int | None) -> list[str]:
    parts = cut(8, context.pp.size * chunks)
    stage = build_stage(
        ModelConfig(96, 64, 176, 8, 4, 2, 16), context, parts, recompute="selective", recompute_layers=some
    )
    return [block.recompute for chunk in stage.chunks for block in chunk.blocks]  # type: ignore[union-attr, misc]


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("some", [1, 2, 3, 4, None])
def test_the_first_layers_of_each_stage_are_meant(stage: int, chunks: int, some: int | None) -> None:
    expected = ["selective"] * (4 if some is None else some)
    expected += ["none"] * (4 - len(expected))
    assert kinds(describe(Grid(pipeline=2), stage), chunks, some) == expected
