"""Recomputing gives the same gradients to the bit, and keeps less."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron.config.train import Recompute
from megatron.kernels.swiglu import swiglu
from megatron.model import mlp
from megatron.model.config import ModelConfig
from megatron.model.initialize import initialize
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank

MODEL = ModelConfig(96, 64, 176, 3, 4, 2, 16, initializer_range=0.2)


GPT = ModelConfig.from_settings(
    {
        "model_type": "gpt2",
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
)


def run(
    recompute: Recompute, dtype: torch.dtype, config: ModelConfig = MODEL
) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """(loss, every gradient, bytes that a forward pass leaves allocated)."""
    model = Transformer(config, single_rank(), dtype, recompute=recompute)
    initialize(model, config, 3)
    tokens = torch.randint(0, 96, (2, 129), generator=torch.Generator().manual_seed(0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = model(tokens[:, :-1], labels=tokens[:, 1:])
    kept = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()], kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("recompute", "at_most"), [("selective", 0.75), ("full", 0.2)])
@pytest.mark.parametrize("config", [MODEL, GPT], ids=["llama", "gpt2"])
def test_gradients_are_the_same_bits_and_less_is_kept(
    config: ModelConfig, dtype: torch.dtype, recompute: Recompute, at_most: float
) -> None:
    loss, gradients, kept = run("none", dtype, config)
    again, gradients_again, kept_again = run(recompute, dtype, config)
    assert torch.equal(loss, again)
    for one, other in zip(gradients, gradients_again, strict=True):
        assert one.abs().max() > 0 and torch.equal(one, other)
    assert kept_again < at_most * kept


def test_what_is_computed_again_is_what_the_gradients_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    _, gradients, _ = run("none", torch.float64)
    calls: list[int] = []

    def wrong_from_the_backward_on(gate_up: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return swiglu(gate_up) * (1.0 if len(calls) <= MODEL.num_hidden_layers else 2.0)

    monkeypatch.setattr(mlp, "swiglu", wrong_from_the_backward_on)
    _, wrong, _ = run("selective", torch.float64)
    assert len(calls) == 2 * MODEL.num_hidden_layers
    assert not all(torch.equal(one, other) for one, other in zip(gradients, wrong, strict=True))
