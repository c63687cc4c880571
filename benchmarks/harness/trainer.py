"""What every contestant is to the worker that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from megatron.data.loader import MicroBatch


@dataclass(frozen=True)
class Trainer:
    """`step` trains on one step's micro-batches; `state_bytes` counts weights, gradients and optimizer state here."""

    step: Callable[[list[MicroBatch]], None]
    state_bytes: Callable[[], dict[str, int]]


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the parts of these tensors that this process holds."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def torch_trainer(
    parameters: list[torch.nn.Parameter], compute_loss: Callable[[MicroBatch], torch.Tensor], micro_batches: int
) -> Trainer:
    """The loop that a user of a plain torch model writes: backward, clip to norm 1, fused AdamW, zero_grad."""
    kinds: dict[type, list[torch.nn.Parameter]] = {}
    for parameter in parameters:  # the fused kernels take plain tensors or DTensors, not both at once
        kinds.setdefault(type(parameter.data), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": group} for group in kinds.values()], lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step(batches: list[MicroBatch]) -> None:
        for batch in batches:
            (compute_loss(batch) / micro_batches).backward()
        _clip(list(kinds.values()))
        optimizer.step()
        optimizer.zero_grad()

    def state_bytes() -> dict[str, int]:
        weights = tensor_bytes(parameters)
        state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
        return {"weights": weights, "gradients": weights, "optimizer": tensor_bytes(state)}

    return Trainer(step, state_bytes)


def _clip(groups: list[list[torch.nn.Parameter]]) -> None:
    """`clip_grad_norm_` to 1; over plain tensors and DTensors together, which it refuses, by its two halves."""
    if len(groups) == 1:
        torch.nn.utils.clip_grad_norm_(groups[0], 1.0)
        return
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    total = torch.stack(whole).norm()
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, 1.0, total)
