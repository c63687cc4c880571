"""The column-parallel backward hides each of its collectives behind a product."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.parallel.layers import column_linear
from megatron.parallel.mesh import Axis, Grid, ParallelContext, describe
from megatron.parallel.weight_gradient import GradientSink, attach_sink

from .recorder import Recorder

LENGTH, BATCH, IN, OUT = 6, 2, 8, 10


class Products(TorchDispatchMode):
    """Records matrix products by what they give: the inputs' gradient [tokens, in] or the weight's [out, in]."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "mm" in func.__name__ or "matmul" in func.__name__:
            names = {LENGTH * BATCH * IN: "grad_inputs", OUT * IN: "grad_weight"}
            self.events.append(names[result.numel()])
        return result


def two_ranks(events: list[str], sequence: bool) -> ParallelContext:
    tp = Axis("tp", 0, 2, (0, 1), Recorder(events))
    return dataclasses.replace(describe(Grid(tensor=2), 0, sequence=sequence), tp=tp)


def backward(events: list[str], sequence: bool, sunk: bool) -> None:
    """Run the layer's backward alone under the recorder; checks the gradients against plain products."""
    generator = torch.Generator().manual_seed(0)
    share = LENGTH // 2 if sequence else LENGTH
    inputs = torch.randn(share, BATCH, IN, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(OUT, IN, generator=generator, dtype=torch.float64))
    grad = torch.randn(LENGTH, BATCH, OUT, generator=generator, dtype=torch.float64)
    buffer = torch.zeros(OUT, IN, dtype=torch.float64)
    if sunk:
        attach_sink(weight, GradientSink(buffer, lambda: None))
    output = column_linear(inputs, weight, two_ranks(events, sequence))
    events.clear()
    with Products(events):
        output.backward(grad)
    whole = torch.cat((inputs, inputs)) if sequence else inputs
    wanted = 2 * (grad @ weight)[:share]
    torch.testing.assert_close(inputs.grad, wanted)
    torch.testing.assert_close(buffer if sunk else weight.grad, grad.flatten(0, 1).t() @ whole.flatten(0, 1))


@pytest.mark.parametrize("sunk", [False, True])
def test_gather_and_reduce_scatter_run_behind_the_products(sunk: bool) -> None:
    events: list[str] = []
    backward(events, sequence=True, sunk=sunk)
    assert sorted(events) == sorted(set(events)), "each once"
    at = events.index
    assert at("start all_gather") < at("grad_inputs") < at("wait all_gather") < at("grad_weight"), events
    assert at("grad_inputs") < at("start reduce_scatter") < at("grad_weight") < at("wait reduce_scatter"), events


@pytest.mark.parametrize("sunk", [False, True])
def test_all_reduce_runs_behind_the_weights_product(sunk: bool) -> None:
    events: list[str] = []
    backward(events, sequence=False, sunk=sunk)
    assert events == ["grad_inputs", "start all_reduce", "grad_weight", "wait all_reduce"]
