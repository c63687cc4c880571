"""Where the tokens of a micro-batch stand, and what they attend to: found out once, read by all layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron.kernels.runs import Documents, Runs
from megatron.model.alibi import key_biases
from megatron.parallel.context import causal_runs, local_positions
from megatron.parallel.mesh import Axis

Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Places:
    """Of this rank's tokens. In packed samples with documents, positions begin anew in each and differ between samples.

    positions i64[1, s] or [b, s]; cos and sin of their rotary angles [s, d] or [b, s, d]; the runs of keys that they
    attend to, None where that is all up to themselves and all are here; the same in layers with a sliding window; and
    the biases of scores by their keys, [1 or b, heads/tp, s], where the model has such.
    """

    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    runs: Runs | None
    windowed_runs: Runs | None
    biases: torch.Tensor | None


def find_places(
    batch: int,
    length: int,
    documents: Documents | None,
    tables: Tables,
    cp: Axis,
    window: int | None = None,
    slopes: torch.Tensor | None = None,
) -> Places:
    """The places of tokens [batch, length], this rank's part of samples that are `cp.size` times as long.

    `documents` are those of these tokens; `tables` are the rotary tables of whole samples; `window` is that of the
    layers that have one, `slopes` [heads/tp] those of biases.
    """
    cos, sin = tables
    positions = local_positions(length, cp, cos.device).unsqueeze(0)
    runs = windowed = None
    if documents is not None or cp.size > 1:
        runs = windowed = causal_runs(batch, length, documents, cp, cos.device)
    if window is not None:
        windowed = replace(runs or causal_runs(batch, length, documents, cp, cos.device), window=window)
    if documents is not None:
        positions = positions - documents.starts
        cos, sin = cos[positions], sin[positions]
    elif cp.size > 1:
        cos, sin = cos[positions[0]], sin[positions[0]]
    biases = None if slopes is None else key_biases(slopes, positions)
    return Places(positions, cos, sin, runs, windowed, biases)
