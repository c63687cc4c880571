"""Token-weighted mean loss of a model over a fixed set of windows: the same on any grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from megatron.data.dataset import Dataset
from megatron.data.loader import BatchLoader, MicroBatch, MicroBatchDataset
from megatron.evaluate.metrics import Markers, Tally, exponential
from megatron.kernels.runs import Documents
from megatron.model.stage import run_micro_batches
from megatron.model.transformer import ChunkedTransformer, Transformer
from megatron.parallel.agreement import Exchange, agree
from megatron.parallel.collectives import all_reduce
from megatron.parallel.pipeline.schedule import forward_only


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per token over `tokens` predictions (the sum of their weights, where these differ); the metrics
    that were asked for; and the same of each part, where it was of several."""

    loss: float
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
    parts: dict[str, Evaluation] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return exponential(self.loss)


def evaluate(
    model: Transformer | ChunkedTransformer,
    dataset: Dataset | MicroBatchDataset,
    exchange: Exchange,
    *,
    micro_batch: int,
    micro_batches: int = 1,
    document_mask: bool = False,
    metrics: Sequence[str] = (),
    markers: Markers | None = None,
) -> Evaluation:
    """The mean loss, and the `metrics`, over all samples of `dataset`; every rank gets the result.

    Samples are dealt to the data ranks in turns of `micro_batches` × `micro_batch`; what the last turn lacks is filled
    with samples that carry no loss. With `document_mask` attention stays within documents. Some metrics need to know
    the `markers` around messages. `exchange` gathers texts from all ranks: what one cannot read is an error on all.
    """
    return evaluate_parts(
        model,
        {"": dataset},
        exchange,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        document_mask=document_mask,
        metrics=metrics,
        markers=markers,
    )


def evaluate_parts(
    model: Transformer | ChunkedTransformer,
    datasets: Mapping[str, Dataset | MicroBatchDataset],
    exchange: Exchange,
    *,
    micro_batch: int,
    micro_batches: int = 1,
    document_mask: bool = False,
    metrics: Sequence[str] = (),
    markers: Markers | None = None,
) -> Evaluation:
    """`evaluate` over several datasets: the figures of all their predictions together, and those of each."""
    tallies = {name: Tally(metrics, markers, model.context.cp, _device(model)) for name in datasets}
    sums = [
        _sums(model, dataset, exchange, tallies[name], micro_batch, micro_batches, document_mask)
        for name, dataset in datasets.items()
    ]
    reduced = all_reduce(torch.stack(sums), model.context.loss)

    def finish(tally: Tally, row: torch.Tensor) -> Evaluation:
        loss, tokens, *shares = row.tolist()
        return Evaluation(loss / tokens if tokens else 0.0, round(tokens), tally.figures(shares))

    parts = {name: finish(tally, row) for (name, tally), row in zip(tallies.items(), reduced, strict=True)}
    if len(parts) == 1:
        return next(iter(parts.values()))
    return replace(finish(next(iter(tallies.values())), reduced.sum(dim=0)), parts=parts)


def _sums(
    model: Transformer | ChunkedTransformer,
    dataset: Dataset | MicroBatchDataset,
    exchange: Exchange,
    tally: Tally,
    micro_batch: int,
    micro_batches: int,
    document_mask: bool,
) -> torch.Tensor:
    """Of this rank's share of a dataset: the sum of losses, the sum of their weights, and the metrics' sums."""
    context, device = model.context, _device(model)
    global_batch = micro_batch * micro_batches * context.data.size
    actions = forward_only(context.pp.size, micro_batches, len(model.chunks))[context.pp.rank]
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    loader = BatchLoader(
        dataset,
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=context.data.rank,
        size=context.data.size,
        vocab_size=model.config.vocab_size,
        pad_last=True,
        document_mask=document_mask,
    )
    with loader, torch.no_grad():
        rounds = math.ceil(len(dataset) / global_batch)
        batch = agree(exchange, loader.next_batch)
        for number in range(rounds):
            present = [to_device(one, device) for one in batch]
            first = number * global_batch + context.data.rank * micro_batch  # of this rank's rows
            told = None
            if tally.sums.numel():
                told = tally.round(present, len(dataset) - first, micro_batch * context.data.size)
            totals += run_micro_batches(model, present, actions, measure=told)
            if number + 1 < rounds:  # behind the work just given to the device
                batch = agree(exchange, loader.next_batch)
    return torch.cat((totals, tally.sums))


def _device(model: Transformer | ChunkedTransformer) -> torch.device:
    return next(model.parameters()).device


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch on `device`; the copy does not hold up the host."""
    if device.type == "cpu":
        return batch

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory().to(device, non_blocking=True)

    documents = batch.documents
    if documents is not None:
        documents = Documents(copy(documents.starts), documents.most)
    weights = None if batch.loss_weights is None else copy(batch.loss_weights)
    return MicroBatch(copy(batch.tokens), copy(batch.labels), documents, weights)
