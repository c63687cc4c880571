"""Token-weighted mean loss of a model over a fixed set of windows: the same on any grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron.data.dataset import Dataset
from megatron.data.loader import BatchLoader, MicroBatch
from megatron.kernels.runs import Documents
from megatron.model.stage import run_micro_batches
from megatron.model.transformer import ChunkedTransformer, Transformer
from megatron.parallel.agreement import Exchange, agree
from megatron.parallel.collectives import all_reduce
from megatron.parallel.pipeline.schedule import forward_only


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per token over `tokens` predictions."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700.0 else math.inf


def evaluate(
    model: Transformer | ChunkedTransformer,
    dataset: Dataset,
    exchange: Exchange,
    *,
    micro_batch: int,
    micro_batches: int = 1,
    document_mask: bool = False,
) -> Evaluation:
    """The mean loss over all samples of `dataset`; every rank gets the result.

    Samples are dealt to the data ranks in turns of `micro_batches` × `micro_batch`; what the last turn lacks is filled
    with samples that carry no loss. With `document_mask` attention stays within documents. `exchange` gathers texts
    from all ranks: what one cannot read is an error on all.
    """
    context = model.context
    device = next(model.parameters()).device
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
            totals += run_micro_batches(model, [to_device(micro_batch, device) for micro_batch in batch], actions)
            if number + 1 < rounds:  # behind the work just given to the device
                batch = agree(exchange, loader.next_batch)
    loss, tokens = all_reduce(totals, context.loss).tolist()
    return Evaluation(loss / max(tokens, 1.0), round(tokens))


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch on `device`; the copy does not hold up the host."""
    if device.type == "cpu":
        return batch

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory().to(device, non_blocking=True)

    documents = batch.documents
    if documents is not None:
        documents = Documents(copy(documents.starts), documents.most)
    return MicroBatch(copy(batch.tokens), copy(batch.labels), documents)
