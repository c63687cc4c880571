"""Where weight gradients go.

A layer computes its own weight gradient in its backward formula. Where the parameter has a `GradientSink` (a view of a
flat bucket of at least float32) it adds the gradient there, reports it, and hands autograd `None`; else autograd
gets the gradient as usual. So accumulation, overlap with communication and a deferred weight step are one path.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

from megatron.kernels.numerics import statistics_dtype
from megatron.kernels.products import Accumulate, operand

_SINK = "gradient_sink"


class LaterProducts:
    """Products that give weight gradients, put off: a schedule with a backward pass in two parts runs them later."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, list[Callable[[], None]]] = {}
        self._collecting: list[Callable[[], None]] | None = None

    @contextmanager
    def collecting(self, place: Hashable) -> Iterator[None]:
        """Within it products are kept under `place`, with the tensors they need."""
        self._collecting = self._waiting[place] = []
        try:
            yield
        finally:
            self._collecting = None

    def run(self, place: Hashable) -> None:
        """Run what was kept under `place`, in the order in which it came."""
        with torch.no_grad():
            for product in self._waiting.pop(place):
                product()

    def keep(self, product: Callable[[], None]) -> bool:
        """Keep a product for later, where products are collected; else False."""
        if self._collecting is None:
            return False
        self._collecting.append(product)
        return True


class GradientSink:
    """A parameter's place in a gradient bucket: `buffer` has its shape, `report` is told after each addition.

    After `clear` the first addition overwrites what the buffer holds, which saves a pass that would set it to zero.
    `prepare`, if given, is called before that addition: the buffer may be without storage until then.
    """

    def __init__(
        self,
        buffer: torch.Tensor,
        report: Callable[[], None],
        later: LaterProducts | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.buffer = buffer
        self.report = report
        self.later = later
        self.prepare = prepare
        self.accumulate: Accumulate | None = None  # in one product, where dtypes differ and a library can
        self._empty = True

    def clear(self) -> None:
        """Forget the gradient: the beginning of a step."""
        self._empty = True

    def add(self, gradient: torch.Tensor) -> None:
        """Add a gradient of the parameter's shape."""
        if self._overwrites():
            self.buffer.copy_(gradient)
        else:
            self.buffer.add_(gradient)
        self.report()

    def add_product(self, grad_output: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add grad_outputᵀ [n, out] · inputs [n, in], now or when the schedule has put it."""
        # What is put off must not keep the graph that its operands came of, and with it the activations received.
        grad_output, inputs = grad_output.detach(), inputs.detach()

        def add() -> None:
            self.accumulate_product(grad_output, inputs)
            self.report()

        if self.later is None or not self.later.keep(add):
            add()

    def accumulate_product(self, grad_output: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add a part of what `report` will be told of later."""
        grad_output, inputs = operand(grad_output), operand(inputs)
        overwrites = self._overwrites()
        if self.buffer.dtype == inputs.dtype:
            beta = 0.0 if overwrites else 1.0
            torch.addmm(self.buffer, grad_output.t(), inputs, beta=beta, out=self.buffer)
        elif self.accumulate is not None:
            if overwrites:
                self.buffer.zero_()
            self.accumulate(self.buffer, grad_output, inputs)
        elif overwrites:
            self.buffer.copy_(grad_output.t() @ inputs)
        else:
            self.buffer.add_(grad_output.t() @ inputs)

    def add_rows(self, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add gradient [n, h] to the rows with these indices [n]."""
        if self._overwrites():
            self.buffer.zero_()
        self.buffer.index_add_(0, rows, gradient.to(self.buffer.dtype))
        self.report()

    def _overwrites(self) -> bool:
        empty, self._empty = self._empty, False
        if empty and self.prepare is not None:
            self.prepare()
        return empty


def attach_sink(parameter: torch.nn.Parameter, sink: GradientSink) -> None:
    """From now on the parameter's gradient goes to `sink`."""
    setattr(parameter, _SINK, sink)


def sink_of(parameter: torch.Tensor) -> GradientSink | None:
    """The parameter's sink, if it has one."""
    return getattr(parameter, _SINK, None)


def linear_weight_gradient(
    sink: GradientSink | None, grad_output: torch.Tensor, inputs: torch.Tensor
) -> torch.Tensor | None:
    """Gradient of a weight [out, in] from grad_output [..., out] and inputs [..., in]: to its sink, else returned."""
    grad_output, inputs = grad_output.flatten(0, -2), inputs.flatten(0, -2)
    if sink is None:
        return (operand(grad_output).t() @ operand(inputs)).to(inputs.dtype)
    sink.add_product(grad_output, inputs)
    return None


def bias_gradient(bias: torch.Tensor | None, grad_output: torch.Tensor) -> torch.Tensor | None:
    """Gradient of a bias [out], where there is one, from grad_output [..., out]; vectors reach sinks by autograd."""
    if bias is None:
        return None
    return grad_output.flatten(0, -2).sum(dim=0, dtype=statistics_dtype(grad_output.dtype)).to(bias.dtype)


def embedding_weight_gradient(
    sink: GradientSink | None, weight: torch.Tensor, rows: torch.Tensor, grad_output: torch.Tensor
) -> torch.Tensor | None:
    """Gradient of an embedding [v, h] from grad_output [..., h] at rows [...]: to its sink, else returned."""
    rows, grad_output = rows.flatten(), grad_output.flatten(0, -2)
    if sink is None:
        return torch.zeros_like(weight).index_add_(0, rows, grad_output.to(weight.dtype))
    sink.add_rows(rows, grad_output)
    return None
