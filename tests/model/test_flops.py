"""FLOP counts: known figures, and what torch counts while our model runs."""

from __future__ import annotations

from dataclasses import replace

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


def test_a_window_leaves_a_band_of_the_square() -> None:
    def keys_seen(window: int | None, full: tuple[int, ...] = ()) -> float:
        config = replace(LLAMA_2_7B, sliding_window=window, full_attention_layers=full)
        return (model_flops_per_token(config, 4096) - model_flops_per_token(LLAMA_2_7B, 0)) / (12 * 32 * 128)

    exact = sum(min(query + 0.5, 1024) for query in range(4096)) / 4096  # half of a query's own key, as in the square
    assert keys_seen(1024) == pytest.approx(32 * exact, rel=1e-6)
    assert keys_seen(1024, tuple(range(8))) == pytest.approx(8 * 2048 + 24 * exact, rel=1e-6)
    assert keys_seen(4096) == keys_seen(5000) == keys_seen(None) == pytest.approx(32 * 2048)


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


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_products_of_a_gpt_are_those_that_run(model_type: str) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    config = ModelConfig.from_settings({"model_type": model_type, **sizes, "num_attention_heads": 6})
    model = Transformer(config, single_rank())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(0, 128, (2, 16))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if "attention" not in str(operation))
    assert products == 2 * 16 * model_flops_per_token(config, 0)


def test_a_gpt_costs_what_the_formula_of_sc21_says() -> None:
    """Narayanan et al., section 5.1, without their recomputation: 72 B s L h² (1 + s/6h + V/12hL)."""
    layers, hidden, heads, vocabulary, length = 80, 12288, 96, 51200, 2048
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = ModelConfig.from_settings({"model_type": "gpt2", **sizes})
    formula = 72 * layers * hidden**2 * (1 + length / (6 * hidden) + vocabulary / (12 * hidden * layers))
    assert model_flops_per_token(config, length, causal=False) == pytest.approx(formula, rel=1e-12)
