"""Attention to runs of keys, for the masks that documents and split sequences make; and who computes it.

Everywhere, it is `ranged_attention`; on a GPU in bf16, the variable-length flash attention that comes with torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron.kernels.attention import ranged_attention, ranged_attention_backward
from megatron.kernels.varlen import varlen_attention, varlen_attention_backward

_FLASH_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Documents:
    """Where the documents of packed samples begin: starts i32[b, s], of each token the index in its sample of its
    document's first token. `most` is the largest number of documents in a sample, known to the host."""

    starts: torch.Tensor
    most: int


@dataclass(frozen=True)
class Runs:
    """Which keys each query attends to: start … stop − 1, both i32[b, s], which do not fall from query to query.

    Causal: each query's run ends one key behind that of the query before it; queries with the same start are one
    document, whose keys no other document has. Otherwise all runs end at the same key. No sample has more than
    `documents` different starts. A `window` leaves of each run the last keys only, as many as it says; the runs are
    then causal.
    """

    start: torch.Tensor
    stop: torch.Tensor
    documents: int
    causal: bool
    window: int | None = None

    def of(self, queries: slice) -> Runs:
        """The runs of some of the queries."""
        return replace(self, start=self.start[:, queries], stop=self.stop[:, queries])


def run_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: Runs
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [b, heads, s, d], key and value [b, kv heads, t, d] → mixed values [b, heads, s, d] and the log-sum-exp of
    the scaled scores [b, heads, s], −∞ for queries without keys. Not differentiable: see `run_attention_backward`."""
    if _by_flash(query):
        return varlen_attention(
            query, key, value, runs.start, runs.stop, runs.documents, runs.causal, window=runs.window
        )
    return ranged_attention(query, key, value, runs.start, runs.stop, runs.window)


def run_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mixed: torch.Tensor,
    log_sum_exp: torch.Tensor,
    runs: Runs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; `mixed` and `log_sum_exp` may be over more keys than are given."""
    if _by_flash(query):
        return varlen_attention_backward(
            grad,
            query,
            key,
            value,
            mixed,
            log_sum_exp,
            runs.start,
            runs.stop,
            runs.documents,
            runs.causal,
            window=runs.window,
        )
    return ranged_attention_backward(grad, query, key, value, mixed, log_sum_exp, runs.start, runs.stop, runs.window)


def whole_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: Runs) -> torch.Tensor:
    """`run_attention` over all keys of the sequence, with its derivative: [b, heads, s, d]."""
    return _WholeAttention.apply(query, key, value, runs)


class _WholeAttention(Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: Runs) -> torch.Tensor:
        mixed, log_sum_exp = run_attention(query, key, value, runs)
        ctx.save_for_backward(query, key, value, mixed, log_sum_exp)
        ctx.runs = runs
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mixed, log_sum_exp = ctx.saved_tensors
        return *run_attention_backward(grad, query, key, value, mixed, log_sum_exp, ctx.runs), None


def _by_flash(query: torch.Tensor) -> bool:
    return query.device.type == "cuda" and query.dtype in _FLASH_DTYPES
