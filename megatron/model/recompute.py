"""Activations that the backward pass computes again, so that they need not be kept: bitwise the same gradients.

`selective` computes norms, the SwiGLU product and the order of attention's heads again, which costs a few passes over
memory for each layer (flash attention does so with its own core). `full` keeps nothing of a layer but its input, for
about a third more FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def computed_again(tensor: torch.Tensor, compute: Callable[[], torch.Tensor], *, active: bool) -> Iterator[None]:
    """Inside, autograd keeps `compute` in place of `tensor`, and calls it when the backward pass wants that tensor.

    `compute` must give the same bits, and should itself hold only what is kept anyway.
    """
    if not active:
        yield
        return

    wanted = id(tensor)  # autograd keeps the hooks: they must not hold the tensor itself

    def pack(saved: torch.Tensor) -> torch.Tensor | Callable[[], torch.Tensor]:
        return compute if id(saved) == wanted else saved

    def unpack(kept: torch.Tensor | Callable[[], torch.Tensor]) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        with torch.no_grad():
            return kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
