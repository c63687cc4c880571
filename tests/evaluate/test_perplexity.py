"""The mean loss over a stream: every prediction once, whatever the batches. For the same on any grid see tests/e2e."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron.data.indexed import IndexedWriter
from megatron.data.windows import StreamWindows
from megatron.evaluate.perplexity import Evaluation, evaluate
from megatron.model.config import ModelConfig
from megatron.model.initialize import initialize
from megatron.model.transformer import Transformer
from megatron.parallel.buckets import build_buckets
from megatron.parallel.gradients import GradientReducer
from megatron.parallel.mesh import single_rank

MODEL = ModelConfig(50, 24, 40, 2, 4, 2, 6, initializer_range=0.2)


@pytest.fixture
def model() -> Transformer:
    made = Transformer(MODEL, single_rank(), torch.float64)
    initialize(made, MODEL, 7)
    return made


def write_stream(prefix: Path, tokens: int) -> np.ndarray:
    """A pair of documents of uneven lengths, with an empty one among them."""
    stream = np.random.default_rng(1).integers(0, 50, tokens)
    with IndexedWriter(prefix, "uint16") as writer:
        for part in np.split(stream, [tokens // 5, tokens // 5, tokens // 2]):
            writer.add_sequence(part)
            writer.end_document()
    return stream


def alone(text: str) -> list[str]:
    """The exchange of a process without others."""
    return [text]


def expected_loss(model: Transformer, stream: np.ndarray, length: int) -> float:
    """Mean over all T - 1 predictions of the stream cut into windows of `length` predictions, one at a time."""
    total = 0.0
    for start in range(0, len(stream) - 1, length):
        window = torch.from_numpy(stream[start : start + length + 1])
        logits = model(window[None, :-1])[:, 0, :50]
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(stream) - 1)


@pytest.mark.parametrize("tokens", [2, 3, 8, 9, 10, 57, 65, 66])
@pytest.mark.parametrize(("micro_batch", "micro_batches"), [(1, 1), (3, 1), (2, 3)])
def test_every_prediction_counts_once(
    tmp_path: Path, model: Transformer, tokens: int, micro_batch: int, micro_batches: int
) -> None:
    stream = write_stream(tmp_path / "p", tokens)
    windows = StreamWindows(str(tmp_path / "p"), 8)
    result = evaluate(model, windows, alone, micro_batch=micro_batch, micro_batches=micro_batches)
    assert result.tokens == tokens - 1
    assert result.loss == pytest.approx(expected_loss(model, stream, 8), rel=1e-13)


def test_nothing_is_left_behind(tmp_path: Path, model: Transformer) -> None:
    """No gradient, no graph, no changed weight: it runs in the middle of training."""
    write_stream(tmp_path / "p", 30)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    windows = StreamWindows(str(tmp_path / "p"), 8)
    first = evaluate(model, windows, alone, micro_batch=2)
    assert evaluate(model, windows, alone, micro_batch=2) == first
    assert all(map(torch.equal, model.parameters(), before))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_graph_is_built_and_gradients_are_left_alone(tmp_path: Path, model: Transformer) -> None:
    """What a training step has gathered so far stays, and the forward pass keeps no activations for a backward."""
    write_stream(tmp_path / "p", 30)
    buckets = build_buckets(model, model.context.shard, zero=0, gradient_dtype=torch.float64)
    GradientReducer(buckets, model.context)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    for bucket in buckets:
        bucket.gradients.fill_(5.0)
    graphs: list[bool] = []
    for module in model.modules():
        module.register_forward_hook(
            lambda _, __, output: graphs.append(
                any(one.requires_grad for one in (output if isinstance(output, tuple) else (output,)))
            )
        )
    evaluate(model, StreamWindows(str(tmp_path / "p"), 8), alone, micro_batch=2)
    assert graphs and not any(graphs)
    assert all(parameter.grad is not None and (parameter.grad == 3.0).all() for parameter in model.parameters())
    assert all((bucket.gradients == 5.0).all() for bucket in buckets)
    assert torch.is_grad_enabled() and model(torch.tensor([[1, 2]])).requires_grad, "training goes on"


def test_perplexity_is_the_exponential() -> None:
    assert Evaluation(math.log(17.0), 5).perplexity == pytest.approx(17.0)
    assert Evaluation(800.0, 5).perplexity == math.inf
