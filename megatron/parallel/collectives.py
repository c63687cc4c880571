"""Collectives over an `Axis`, and the pairs of them that autograd needs.

Every function is the identity on an axis of size 1. Sequence dims are dim 0, so that shares are contiguous.
"""

from __future__ import annotations

import torch

from megatron.parallel.communicator import Work
from megatron.parallel.mesh import Axis


class Done:
    """The `Work` of an operation that had nothing to do."""

    def wait(self) -> None:
        return None


def start_all_reduce(tensor: torch.Tensor, axis: Axis, maximum: bool = False) -> Work:
    """Start summing `tensor` (contiguous) over the axis in place, or taking its maximum."""
    return Done() if axis.size == 1 else axis.comm.all_reduce(tensor, maximum)


def all_reduce(tensor: torch.Tensor, axis: Axis, maximum: bool = False) -> torch.Tensor:
    """Sum `tensor` over the axis in place (or take the maximum) and return it."""
    start_all_reduce(tensor, axis, maximum).wait()
    return tensor


def start_all_gather(tensor: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, Work]:
    """Start concatenating the shares [s/n, …] of all ranks: the output [s, …], to be read after the work's end."""
    if axis.size == 1:
        return tensor, Done()
    tensor = tensor.contiguous()
    output = tensor.new_empty((tensor.shape[0] * axis.size, *tensor.shape[1:]))
    return output, axis.comm.all_gather(output, tensor)


def all_gather(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[s/n, …] on every rank → [s, …], in rank order."""
    output, work = start_all_gather(tensor, axis)
    work.wait()
    return output


def start_reduce_scatter(tensor: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, Work]:
    """Start summing [s, …] over the axis, keeping this rank's share [s/n, …]."""
    if axis.size == 1:
        return tensor, Done()
    assert tensor.shape[0] % axis.size == 0, (tensor.shape, axis.size)
    output = tensor.new_empty((tensor.shape[0] // axis.size, *tensor.shape[1:]))
    return output, axis.comm.reduce_scatter(output, tensor.contiguous())


def reduce_scatter(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The sum of [s, …] over the axis, of which each rank keeps its share [s/n, …]."""
    output, work = start_reduce_scatter(tensor, axis)
    work.wait()
    return output


def reduce_activations(tensor: torch.Tensor, axis: Axis, sequence: bool) -> torch.Tensor:
    """Sum partial activations [s, b, h]: to a share of the sequence under sequence parallelism, else to all ranks."""
    return reduce_scatter(tensor, axis) if sequence else all_reduce(tensor, axis)
