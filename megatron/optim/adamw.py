"""AdamW (Loshchilov and Hutter, 2019) over the flat ranges that this rank owns.

Masters and moments have the gradients' dtype, at least float32. Where the weights have that dtype too, the weights are
the masters. Weight decay applies to matrices only. The arithmetic is torch's fused kernel, which takes the verdict
"not finite" as a device tensor, so that no step waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

from megatron.config.optimizer import OptimizerConfig
from megatron.parallel.buckets import Bucket
from megatron.parallel.layout import Region


@dataclass(frozen=True)
class _Run:
    """Neighbouring parameters with the same weight decay: views of masters, gradients and moments, and a step count."""

    master: torch.Tensor
    gradient: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    updates: torch.Tensor


class AdamW:
    """Optimizer state of one rank and its update."""

    STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")

    def __init__(self, buckets: list[Bucket], config: OptimizerConfig) -> None:
        self.buckets, self.config = buckets, config
        self._state: dict[str, list[torch.Tensor]] = {kind: [] for kind in self.STATE_KINDS}
        self._runs: dict[bool, list[_Run]] = {True: [], False: []}
        for bucket in buckets:
            gradients = bucket.owned_gradients
            shared = bucket.weights.dtype == gradients.dtype
            self._state["master"].append(bucket.owned_weights if shared else bucket.owned_weights.to(gradients.dtype))
            self._state["exp_avg"].append(torch.zeros_like(gradients))
            self._state["exp_avg_sq"].append(torch.zeros_like(gradients))
            for matrix, start, stop in _decay_runs(bucket):
                views = (self._state[kind][-1][start:stop] for kind in self.STATE_KINDS)
                master, exp_avg, exp_avg_sq = views
                updates = torch.zeros((), dtype=torch.float32, device=gradients.device)
                self._runs[matrix].append(_Run(master, gradients[start:stop], exp_avg, exp_avg_sq, updates))

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

    def step(self, learning_rate: float, divisor: torch.Tensor, not_finite: torch.Tensor) -> None:
        """Update the owned weights from gradients / `divisor`; not at all where `not_finite` (float32) is 1; both are
        scalars.

        The gradients are divided in place. The weights of other ranks' ranges are not touched: gather them next.
        """
        for bucket in self.buckets:
            bucket.owned_gradients.div_(divisor)  # the fused kernel could, but reads the scale as float32 only
        for matrix, runs in self._runs.items():
            adamw(
                [run.master for run in runs],
                [run.gradient for run in runs],
                [run.exp_avg for run in runs],
                [run.exp_avg_sq for run in runs],
                [],
                [run.updates for run in runs],
                fused=True,
                found_inf=not_finite,
                amsgrad=False,
                maximize=False,
                lr=learning_rate,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                weight_decay=self.config.weight_decay if matrix else 0.0,
                eps=self.config.eps,
            )
        self._round_masters()

    def _round_masters(self) -> None:
        """Write the weights anew from masters of another dtype."""
        for bucket, master in zip(self.buckets, self._state["master"], strict=True):
            if master.dtype != bucket.weights.dtype:
                bucket.owned_weights.copy_(master)

    def state_regions(self, kind: str, copies: bool = True) -> Iterator[tuple[Region, torch.Tensor]]:
        """The owned state of one kind as rectangles of canonical tensors; `copies=False` leaves out extra copies."""
        for bucket, flat in zip(self.buckets, self._state[kind], strict=True):
            for slot, start, stop in bucket.owned_slots():
                yield from slot.spec.flat_regions(flat[start:stop], bucket.owned[0] + start - slot.start, copies)

    def reset_masters(self) -> None:
        """Take the masters from the weights: after these were loaded without optimizer state."""
        for bucket, master in zip(self.buckets, self._state["master"], strict=True):
            if master.dtype != bucket.weights.dtype:
                master.copy_(bucket.owned_weights)

    @property
    def updates(self) -> int:
        """Number of updates done: steps less those skipped for a gradient that was not finite. Waits for the device."""
        runs = self._runs[True] + self._runs[False]
        return int(runs[0].updates.item()) if runs else 0

    def set_updates(self, updates: int) -> None:
        """Continue counting from a checkpoint."""
        for run in self._runs[True] + self._runs[False]:
            run.updates.fill_(float(updates))


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
