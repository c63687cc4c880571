"""Figures of a validation besides its loss, those of Megatron-LLM: each is one function and one registration.

A metric is the quotient of two sums over all labels of the validation set. So it is the same on any grid, whatever the
batches; Megatron-LLM's are means of the micro-batches' quotients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron.data.loader import MicroBatch
from megatron.kernels.runs import Documents
from megatron.model.loss import IGNORED, Predictions
from megatron.model.stage import Measure
from megatron.parallel.context import local_part
from megatron.parallel.mesh import Axis

_MARKED = 3  # labels: a marker and the two behind it, which are the role and a newline, or a newline's two tokens


@dataclass(frozen=True)
class Markers:
    """The tokens that begin and end a message."""

    start: int
    end: int


@dataclass(frozen=True)
class Labels:
    """What is known of labels, all [b, s]: their `losses` and the `weights` of these; whether they were predicted
    (`correct`), carry loss (`counted`), are besides no part of the markup around messages (`content`), or are the
    first of their row (`first`), for counts per row."""

    losses: torch.Tensor
    weights: torch.Tensor
    correct: torch.Tensor
    counted: torch.Tensor
    content: torch.Tensor
    first: torch.Tensor


Quotient = tuple[torch.Tensor, torch.Tensor]  # of each label, its share in the upper and in the lower sum


@dataclass(frozen=True)
class Metric:
    """`shares` of each label in the two sums; `finish` turns their quotient into the figure."""

    shares: Callable[[Labels], Quotient]
    finish: Callable[[float], float]
    needs_markers: bool


METRICS: dict[str, Metric] = {}


def metric(
    *, finish: Callable[[float], float] = float, needs_markers: bool = False
) -> Callable[[Callable[[Labels], Quotient]], Callable[[Labels], Quotient]]:
    """Register a function as the metric of its name, for `evaluate.metrics`."""

    def register(shares: Callable[[Labels], Quotient]) -> Callable[[Labels], Quotient]:
        METRICS[shares.__name__] = Metric(shares, finish, needs_markers)
        return shares

    return register


def exponential(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700.0 else math.inf


@metric(finish=exponential)
def perplexity(labels: Labels) -> Quotient:
    """The exponential of the mean loss."""
    return labels.losses * labels.weights, labels.weights


@metric()
def accuracy(labels: Labels) -> Quotient:
    """Of the labels that carry loss, those that the model finds likeliest."""
    return labels.correct & labels.counted, labels.counted


@metric(needs_markers=True)
def instruct_accuracy(labels: Labels) -> Quotient:
    """The accuracy without the markup around messages."""
    return labels.correct & labels.content, labels.content


@metric()
def count_loss_mask(labels: Labels) -> Quotient:
    """Labels that carry loss, per row."""
    return labels.counted, labels.first


@metric(needs_markers=True)
def count_instruct_mask(labels: Labels) -> Quotient:
    """Labels that carry loss and are no markup, per row."""
    return labels.content, labels.first


class Tally:
    """Adds up what some metrics need, of this rank's labels."""

    def __init__(self, names: Sequence[str], markers: Markers | None, cp: Axis, device: torch.device) -> None:
        self._metrics = {name: METRICS[name] for name in names}
        assert markers is not None or not any(found.needs_markers for found in self._metrics.values()), names
        self._markers, self._cp = markers, cp
        self.sums = torch.zeros(2 * len(self._metrics), dtype=torch.float64, device=device)

    def round(self, batches: Sequence[MicroBatch], left: int, stride: int) -> Measure:
        """What adds up the predictions for these micro-batches, each `stride` rows of the data behind the one before.

        `left` rows are left from the first one's beginning on; rows behind them fill a micro-batch up and do not count.
        """
        return lambda number, predictions: self._add(batches[number], left - number * stride, predictions)

    def _add(self, batch: MicroBatch, rows: int, predictions: Predictions) -> None:
        labels = self._labels(batch, rows, predictions)
        shares = [share for found in self._metrics.values() for share in found.shares(labels)]
        self.sums += torch.stack([share.sum(dtype=torch.float64) for share in shares])

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """The figures, from the sums of all ranks."""
        pairs = zip(self._metrics.items(), sums[::2], sums[1::2], strict=True)
        return {name: found.finish(upper / lower if lower else math.nan) for (name, found), upper, lower in pairs}

    def _labels(self, batch: MicroBatch, rows: int, predictions: Predictions) -> Labels:
        counted = batch.labels.ne(IGNORED)
        weights = counted.to(torch.float64) if batch.loss_weights is None else counted * batch.loss_weights
        counted = weights > 0
        content = counted
        if self._markers is not None:
            content = counted & ~in_markup(batch.labels, batch.documents, self._markers)
        first = torch.zeros_like(counted)
        first[: max(rows, 0), 0] = True
        weights, counted, content, first = (local_part(whole, self._cp) for whole in (weights, counted, content, first))
        return Labels(predictions.losses.t(), weights, predictions.correct.t(), counted, content, first)


def in_markup(labels: torch.Tensor, documents: Documents | None, markers: Markers) -> torch.Tensor:
    """Which labels [b, s] are a marker or one of the two behind it, within their document: Megatron-LLM's rule.

    With Llama-2's tokenizer that is `<|im_start|>`, the word for the role and the newline; and `<|im_end|>` and the two
    tokens of the newline that follows it.
    """
    marker = (labels == markers.start) | (labels == markers.end)
    found = marker.clone()
    for behind in range(1, _MARKED):
        near = marker[:, :-behind]
        if documents is not None:
            near = near & (documents.starts[:, behind:] == documents.starts[:, :-behind])
        found[:, behind:] |= near
    return found
