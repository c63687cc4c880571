"""Where the tokens of a micro-batch stand, and what they attend to: found out once, read by all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron.kernels.runs import Documents, Runs
from megatron.parallel.context import causal_runs, local_positions
from megatron.parallel.mesh import Axis

Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Places:
    """Of this rank's tokens. In packed samples with documents, positions begin anew in each and differ between samples.

    positions i64[1, s] or [b, s]; cos and sin of their rotary angles [s, d] or [b, s, d]; the runs of keys that they
    attend to, None where that is all up to themselves and all are here.
    """

    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    runs: Runs | None


def find_places(batch: int, length: int, documents: Documents | None, tables: Tables, cp: Axis) -> Places:
    """The places of tokens [batch, length], this rank's part of samples that are `cp.size` times as long.

    `documents` are those of these tokens; `tables` are the rotary tables of whole samples.
    """
    cos, sin = tables
    positions = local_positions(length, cp, cos.device).unsqueeze(0)
    if documents is None and cp.size == 1:
        return Places(positions, cos, sin, None)
    runs = causal_runs(batch, length, documents, cp, cos.device)
    if documents is not None:
        positions = positions - documents.starts
        return Places(positions, cos[positions], sin[positions], runs)
    return Places(positions, cos[positions[0]], sin[positions[0]], runs)
