"""AdamW (Loshchilov and Hutter, 2019) over the flat ranges that this rank owns.

Masters and moments have the gradients' dtype, at least float32. Where the weights have that dtype too, the weights are
the masters. Weight decay applies to matrices only. The update takes the verdict "not finite" as a device tensor, so
that no step waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron.config.optimizer import OptimizerConfig
from megatron.kernels.adamw import Hyperparameters, adamw_update_
from megatron.parallel.buckets import Bucket
from megatron.parallel.layout import Region


@dataclass(frozen=True)
class _Run:
    """Neighbouring parameters with the same weight decay: views of masters, gradients, moments and weights."""

    is_matrix: bool
    master: torch.Tensor
    gradient: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    weights: torch.Tensor | None


class AdamW:
    """Optimizer state of one rank and its update."""

    STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")

    def __init__(self, buckets: list[Bucket], config: OptimizerConfig) -> None:
        self.buckets, self.config = buckets, config
        self._state: dict[str, list[torch.Tensor]] = {kind: [] for kind in self.STATE_KINDS}
        self._runs: list[_Run] = []
        self._updates = torch.zeros((), dtype=torch.float32, device=buckets[0].gradients.device)
        for bucket in buckets:
            gradients = bucket.owned_gradients
            shared = bucket.weights.dtype == gradients.dtype
            self._state["master"].append(bucket.owned_weights if shared else bucket.owned_weights.to(gradients.dtype))
            self._state["exp_avg"].append(torch.zeros_like(gradients))
            self._state["exp_avg_sq"].append(torch.zeros_like(gradients))
            for is_matrix, start, stop in _decay_runs(bucket):
                master, exp_avg, exp_avg_sq = (self._state[kind][-1][start:stop] for kind in self.STATE_KINDS)
                weights = None if shared else bucket.owned_weights[start:stop]
                self._runs.append(_Run(is_matrix, master, gradients[start:stop], exp_avg, exp_avg_sq, weights))

    @property
    def has_masters(self) -> bool:
        """Whether masters are kept beside the weights, since these have another dtype."""
        return any(bucket.weights.dtype != bucket.gradients.dtype for bucket in self.buckets)

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank, the weights themselves not counted."""
        total = 0
        for kind, tensors in self._state.items():
            for bucket, tensor in zip(self.buckets, tensors, strict=True):
                if kind != "master" or tensor.dtype != bucket.weights.dtype:
                    total += tensor.numel() * tensor.element_size()
        return total

    def state_tensors(self) -> Iterator[torch.Tensor]:
        """Every flat tensor of the state; masters may be the weights themselves."""
        for tensors in self._state.values():
            yield from tensors

    def step(self, learning_rate: float, divisor: torch.Tensor, not_finite: torch.Tensor) -> None:
        """Update the owned weights from gradients / `divisor`; not at all where `not_finite` (float32) is 1; both are
        scalars.

        The gradients are used up. The weights of other ranks' ranges are not touched: gather them next.
        """
        self._updates += 1.0 - not_finite
        config = self.config
        for run in self._runs:
            decay = config.weight_decay if run.is_matrix else 0.0
            numbers = Hyperparameters(learning_rate, config.beta1, config.beta2, config.eps, decay)
            adamw_update_(
                run.master,
                run.gradient,
                run.exp_avg,
                run.exp_avg_sq,
                run.weights,
                divisor,
                not_finite,
                self._updates,
                numbers,
            )

    def state_regions(self, kind: str, copies: bool = True) -> Iterator[tuple[Region, torch.Tensor]]:
        """The owned state of one kind as rectangles of canonical tensors; `copies=False` leaves out extra copies."""
        for bucket, flat in zip(self.buckets, self._state[kind], strict=True):
            yield from bucket.owned_regions(flat, copies)

    def reset_masters(self) -> None:
        """Take the masters from the weights: after these were loaded without optimizer state."""
        for bucket, master in zip(self.buckets, self._state["master"], strict=True):
            if master.dtype != bucket.weights.dtype:
                master.copy_(bucket.owned_weights)

    @property
    def updates(self) -> int:
        """Number of updates done: steps less those skipped for a gradient that was not finite. Waits for the device."""
        return int(self._updates.item())

    def set_updates(self, updates: int) -> None:
        """Continue counting from a checkpoint."""
        self._updates.fill_(float(updates))


def _decay_runs(bucket: Bucket) -> Iterator[tuple[bool, int, int]]:
    """(is matrix, start, stop) of the longest runs of one kind in the owned range; gaps hold zeros and may join in."""
    current: tuple[bool, int, int] | None = None
    for slot, start, stop in bucket.owned_slots():
        if current is not None and current[0] == slot.is_matrix:
            current = (current[0], current[1], stop)
        else:
            if current is not None:
                yield current
            current = (slot.is_matrix, start, stop)
    if current is not None:
        yield current
