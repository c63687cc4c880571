"""FLOP counts: known figures, and what torch counts while our model runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron.model.config import ModelConfig
from megatron.model.flops import model_flops_per_token
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank

LLAMA_2_7B = ModelConfig(32000, 4096, 11008, 32, 32, 32, 128)
LLAMA_2_70B = ModelConfig(32000, 8192, 28672, 80, 64, 8, 128)


def test_llama_2_7b_at_4096_tokens() -> None:
    assert model_flops_per_token(LLAMA_2_7B, 4096) == pytest.approx(42.9e9, rel=2e-3)
    # 6 N without attention and embedding is its limit for short sequences
    assert model_flops_per_token(LLAMA_2_7B, 1) == pytest.approx(6 * (6_738_415_616 - 32000 * 4096), rel=1e-4)


def test_attention_grows_with_half_the_square() -> None:
    per_sequence = 4096 * (model_flops_per_token(LLAMA_2_70B, 4096) - model_flops_per_token(LLAMA_2_70B, 0))
    # queries x keys and probabilities x values: 2 products of 2 FLOPs, 3 times for forward and backward, half of it
    assert per_sequence == 80 * 64 * 128 * (2 * 2 * 3) * 4096**2 / 2


@pytest.mark.parametrize("key_value_heads", [1, 2, 6])
def test_products_are_those_that_run(key_value_heads: int) -> None:
    config = ModelConfig(128, 24, 40, 3, 6, key_value_heads, 10)
    model = Transformer(config, single_rank())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(0, 128, (2, 16))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if "attention" not in str(operation))
    assert products == 2 * 16 * model_flops_per_token(config, 0)
