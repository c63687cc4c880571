"""Ways to break the program on purpose: each takes out one collective, one wait or one scaling.

A mutation is a context manager of patches; workers apply it around a run. What the equivalence check must find is
only worth something if it finds these.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from megatron.kernels.runs import Documents
from megatron.model import loss, places, stage, vocabulary
from megatron.optim import clip
from megatron.parallel import buckets, context, gradients, layers, weights
from megatron.parallel.buckets import Bucket
from megatron.parallel.collectives import Done
from megatron.parallel.pipeline import engine
from megatron.parallel.pipeline.schedule import incoming
from megatron.parallel.weight_gradient import GradientSink, LaterProducts
from megatron.train import step


def _own_share(tensor: torch.Tensor, axis: Any) -> torch.Tensor:
    return tensor.chunk(axis.size)[axis.rank].contiguous()


def _unwaited(start: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: (start(*arguments)[0], Done())


def _unsummed_rows(tensor: torch.Tensor, axis: Any, sequence: bool) -> torch.Tensor:
    return _own_share(tensor, axis) if sequence else tensor


def _count_every_copy(original: Callable[..., Any]) -> Callable[..., Any]:
    def pieces(bucket: Bucket, flat: torch.Tensor) -> Iterator[Any]:
        for slot, piece, view in original(bucket, flat):
            yield slot, dataclasses.replace(piece, copy_rank=0), view

    return pieces


def _padding_has_probability(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda logits, *rest: function(logits, *rest[:-1], logits.shape[-1])


def _finish_without_waiting(reducer: gradients.GradientReducer) -> None:
    reducer._works = []
    reducer._sum_copies()


def _take_weights_without_waiting(gathered: Any) -> None:
    gathered.start()
    gathered._whole, gathered._work = True, None


def _zeros_for_the_backward_pass(layer: Any) -> None:
    for gathered in layer.weights:
        if not gathered._whole:
            buckets.give_storage(gathered.bucket.weights)
            gathered.bucket.weights.zero_()
            gathered._whole = True


def _keep_what_is_gathered(model_weights: Any, units: Any, needs: Any) -> None:
    """Nothing is freed or forgotten: the weights of the first step are used for ever."""
    for need in needs:
        for bucket_weights in need:
            bucket_weights.forget = lambda: None
    _ATTACH(model_weights, units, needs)


_ATTACH = weights.ShardedWeights._attach


def _count_every_replica(norm: Any) -> torch.Tensor:
    norm._counts = 1
    return _NORM(norm)


_NORM = clip.GradientNorm.compute


def _settle_without_waiting(reducer: Any) -> None:
    if reducer._under_way is not None:
        reducer._under_way = dataclasses.replace(reducer._under_way, work=Done())
    _SETTLE(reducer)


_SETTLE = gradients.ShardedGradientReducer._settle


def _take_without_waiting(mail: Any, action: Any) -> torch.Tensor | None:
    mail.ask(action)
    return mail.expected.pop(action)[0] if action in mail.expected else None


def _take_around_the_ring_without_waiting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Only of messages between the ends of the ring nobody waits for the end."""

    def take(mail: Any, action: Any) -> torch.Tensor | None:
        source = incoming(action, mail.context.pp.rank, mail.context.pp.size, mail.chunks)
        return _take_without_waiting(mail, action) if source is not None and source.wraps else original(mail, action)

    return take


def _reuse_what_is_sent(original: Callable[..., None]) -> Callable[..., None]:
    def send(mail: Any, action: Any, message: torch.Tensor) -> None:
        original(mail, action, message)
        message.zero_()

    return send


@torch.no_grad()
def _run_the_first_again(later: Any, _: Any) -> None:
    for product in next(iter(later._waiting.values())):
        product()


def _swap_chunks(original: Callable[..., Any]) -> Callable[..., Any]:
    """Each stage runs its chunks in the wrong order (but for the first and the last, which have other inputs)."""

    def run(actions: Any, stage: Any, *rest: Any, chunks: int = 1, **options: Any) -> Any:
        middle = range(1, chunks - 1)
        swapped = dict(zip(middle, reversed(middle), strict=True))
        return original(
            actions,
            lambda micro_batch, chunk, hidden: stage(micro_batch, swapped.get(chunk, chunk), hidden),
            *rest,
            chunks=chunks,
            **options,
        )

    return run


def _own_gradient(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
    return _unsummed_rows(grad_output, ctx.tp, ctx.sequence), None, None


def _ignore_tokens(norm: torch.Tensor, divisor: torch.Tensor, limit: float) -> torch.Tensor:
    return clip.clip_divisor(norm, torch.ones_like(divisor), limit)


def _add_results(mixed: torch.Tensor, total: torch.Tensor, part: torch.Tensor, part_total: torch.Tensor) -> None:
    mixed.add_(part)
    total.copy_(torch.logaddexp(total, part_total))


def _drop_key_gradients_of_others(original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
        query, *others = original(*arguments)
        return (query, *others) if arguments[-1].causal else (query, *map(torch.zeros_like, others))

    return backward


MUTATIONS: dict[str, Callable[[], Any]] = {
    "ring-not-waited": lambda: patch.object(context._Passing, "wait", lambda passing: passing._coming),
    "ring-results-added": lambda: patch.object(context, "_merge", _add_results),
    "key-gradients-of-others-dropped": lambda: patch.object(
        context, "run_attention_backward", _drop_key_gradients_of_others(context.run_attention_backward)
    ),
    "gathered-key-gradients-not-summed": lambda: patch.object(
        context, "reduce_scatter", lambda tensor, axis: _own_share(tensor, axis)
    ),
    "keys-gathered-in-rank-order": lambda: patch.object(
        context, "_gather", lambda block, cp: torch.cat([*context.all_gather(block.unsqueeze(0), cp)], dim=3)
    ),
    "positions-of-the-first-part": lambda: patch.object(
        places, "local_positions", lambda length, *_: torch.arange(length)
    ),
    "tokens-of-another-part": lambda: patch.object(
        stage, "local_part", lambda whole, cp: _own_share(whole.t(), cp).t()
    ),
    "documents-ignored": lambda: patch.object(stage, "_local_documents", lambda *_: None),
    "documents-of-another-part": lambda: patch.object(
        stage,
        "_local_documents",
        lambda documents, cp: Documents(_own_share(documents.starts.t(), cp).t(), documents.most),
    ),
    "column-backward-not-reduced": lambda: patch.object(layers, "start_all_reduce", lambda *_: Done()),
    "row-forward-not-reduced": lambda: patch.object(layers, "reduce_activations", _unsummed_rows),
    "sequence-gradient-not-summed": lambda: patch.object(
        layers, "start_reduce_scatter", lambda tensor, axis: (_own_share(tensor, axis), Done())
    ),
    "sequence-not-gathered": lambda: patch.object(
        layers, "all_gather", lambda tensor, axis: tensor.repeat(axis.size, 1, 1)
    ),
    "row-bias-added-on-every-rank": lambda: patch.object(layers, "_add_once", lambda output, bias: output + 2 * bias),
    "positions-of-the-first-share": lambda: patch.object(
        vocabulary.EmbeddingWithPositions,
        "_share",
        lambda embedding, positions: positions.chunk(embedding.context.tp.size)[0],
    ),
    "loss-statistics-not-reduced": lambda: patch.object(loss, "all_reduce", lambda tensor, *_, **__: tensor),
    "data-gradients-not-reduced": lambda: patch.object(gradients.GradientReducer, "_reduce", lambda *_: Done()),
    "copies-not-summed": lambda: patch.object(gradients.GradientReducer, "_sum_copies", lambda _: None),
    "updated-weights-not-gathered": lambda: patch.object(weights.GatheredWeights, "updated", lambda _: None),
    "weights-of-the-last-step-kept": lambda: patch.object(weights.ShardedWeights, "_attach", _keep_what_is_gathered),
    "weights-not-gathered-for-the-backward-pass": lambda: patch.object(
        weights._Layer, "begin_backward", _zeros_for_the_backward_pass
    ),
    "gradients-of-the-last-micro-batch-only": lambda: patch.object(
        gradients.ShardedGradientReducer, "_accumulates", lambda *_: False
    ),
    "replicas-not-summed": lambda: patch.object(gradients.GradientReducer, "_sum_replicas", lambda *_: Done()),
    "replicas-counted-in-norm": lambda: patch.object(clip.GradientNorm, "compute", _count_every_replica),
    "norm-not-reduced": lambda: patch.object(clip, "all_reduce", lambda tensor, _: tensor),
    "copies-counted-in-norm": lambda: patch.object(Bucket, "owned_pieces", _count_every_copy(Bucket.owned_pieces)),
    "loss-totals-not-reduced": lambda: patch.object(step, "all_reduce", lambda tensor, _: tensor),
    "gradients-not-divided-by-tokens": lambda: patch.object(step, "clip_divisor", _ignore_tokens),
    "padding-in-the-softmax": lambda: patch.object(
        loss, "local_statistics", _padding_has_probability(loss.local_statistics)
    ),
    "padding-gets-gradient": lambda: patch.object(
        loss, "logits_gradient_", _padding_has_probability(loss.logits_gradient_)
    ),
    "adapter-gradient-not-summed": lambda: patch.object(layers._IntoColumns, "backward", _own_gradient),
    "head-gradient-not-reduced": lambda: patch.object(loss, "reduce_activations", _unsummed_rows),
    "gradients-of-the-last-step-kept": lambda: patch.object(GradientSink, "clear", lambda _: None),
    # These need a communicator that punishes them: gloo is usually done before anybody looks.
    "column-backward-not-waited": lambda: patch.object(
        layers, "start_reduce_scatter", _unwaited(layers.start_reduce_scatter)
    ),
    "inputs-gathered-not-waited": lambda: patch.object(layers, "start_all_gather", _unwaited(layers.start_all_gather)),
    "data-gradients-not-waited": lambda: patch.object(gradients.GradientReducer, "finish", _finish_without_waiting),
    "weights-not-waited": lambda: patch.object(weights.BucketWeights, "wait", _take_weights_without_waiting),
    "gradients-of-a-layer-not-waited": lambda: patch.object(
        gradients.ShardedGradientReducer, "_settle", _settle_without_waiting
    ),
    "message-not-waited": lambda: patch.object(engine._Mail, "take", _take_without_waiting),
    "message-around-the-ring-not-waited": lambda: patch.object(
        engine._Mail, "take", _take_around_the_ring_without_waiting(engine._Mail.take)
    ),
    "weight-products-dropped": lambda: patch.object(LaterProducts, "run", lambda later, place: None),
    "weight-products-of-another-micro-batch": lambda: patch.object(LaterProducts, "run", _run_the_first_again),
    "chunks-swapped": lambda: patch.object(stage, "run_stage", _swap_chunks(stage.run_stage)),
    "sent-buffer-reused": lambda: patch.object(engine._Mail, "send", _reuse_what_is_sent(engine._Mail.send)),
}


@contextlib.contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Break the program as `name` says (None: not at all)."""
    with contextlib.nullcontext() if name is None else MUTATIONS[name]():
        yield
