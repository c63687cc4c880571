"""Our GPT models against transformers' on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Model, PreTrainedModel

from .oracle import (
    compare_with_reference,
    our_logits,
    ours,
    random_gpt2,
    random_gpt_neox,
    random_tokens,
    widened,
)

Make = Callable[..., PreTrainedModel]

SHAPES: dict[str, tuple[Make, dict[str, Any]]] = {
    "gpt2": (random_gpt2, {}),
    "gpt2, head of its own": (random_gpt2, {"tie_word_embeddings": False}),
    "gpt2, exact gelu": (random_gpt2, {"activation_function": "gelu"}),
    "gpt2, the approximation under its other name": (random_gpt2, {"activation_function": "gelu_pytorch_tanh"}),
    "gpt2, large eps and a width that is not 4 h": (random_gpt2, {"layer_norm_epsilon": 1e-2, "n_inner": 37}),
    "gpt2, one head, odd vocabulary": (random_gpt2, {"n_head": 1, "vocab_size": 97}),
    "gpt2, as many positions as tokens": (random_gpt2, {"n_positions": 24}),
    "gpt_neox": (random_gpt_neox, {}),
    "gpt_neox, tied, three heads": (
        random_gpt_neox,
        {"tie_word_embeddings": True, "num_attention_heads": 3, "hidden_size": 30},
    ),
    "gpt_neox, approximate gelu, other base": (
        random_gpt_neox,
        {"hidden_act": "gelu_new", "rotary_emb_base": 1e6},
    ),
    "gpt_neox, no biases in attention": (random_gpt_neox, {"attention_bias": False}),
    "gpt_neox, scaled angles": (
        random_gpt_neox,
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    ),
}


@pytest.mark.parametrize(("make", "fields"), SHAPES.values(), ids=SHAPES.keys())
def test_random_models_equal_the_float64_reference(tmp_path: Path, make: Make, fields: dict[str, Any]) -> None:
    compare_with_reference(tmp_path, make(**fields))


FAULTS: dict[str, tuple[Make, dict[str, Any]]] = {
    "the other gelu": (random_gpt2, {"activation_function": "gelu"}),
    "eps": (random_gpt2, {"layer_norm_epsilon": 1e-3}),
    "rotary base x 2": (random_gpt_neox, {"rotary_emb_base": 2e4}),
}


@torch.no_grad()
@pytest.mark.parametrize(("make", "fault"), FAULTS.values(), ids=FAULTS.keys())
def test_the_comparison_sees_a_wrong_constant(tmp_path: Path, make: Make, fault: dict[str, Any]) -> None:
    make().save_pretrained(tmp_path)
    other, tokens = widened(make(**fault)), random_tokens(96)
    assert (our_logits(ours(tmp_path, torch.float64), tokens) - other(tokens).logits).abs().max() > 1e-6


@torch.no_grad()
@pytest.mark.parametrize(
    "vector", ["attn.c_attn.bias", "attn.c_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias", "ln_1.bias"]
)
def test_the_comparison_sees_a_bias_left_out(tmp_path: Path, vector: str) -> None:
    reference, tokens = random_gpt2(), random_tokens(96)
    reference.save_pretrained(tmp_path)
    reference.get_parameter(f"transformer.h.1.{vector}").zero_()
    assert (our_logits(ours(tmp_path, torch.float32), tokens) - reference(tokens).logits).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("make", [random_gpt2, random_gpt_neox])
def test_bf16_stays_near_float64(tmp_path: Path, make: Make) -> None:
    reference = make().bfloat16()
    reference.save_pretrained(tmp_path)
    tokens = random_tokens(96)
    theirs = reference(tokens).logits.double()
    exact = widened(reference)(tokens).logits
    mine = our_logits(ours(tmp_path, torch.bfloat16), tokens).double()
    assert (mine - exact).square().mean().sqrt() <= 1.5 * (theirs - exact).square().mean().sqrt()


@torch.no_grad()
def test_a_file_saved_without_the_head_has_shorter_names_and_loads(tmp_path: Path) -> None:
    """As the original GPT-2 is published, with the causal masks that old exports hold."""
    reference, tokens = random_gpt2(), random_tokens(96)
    bare = GPT2Model(reference.config)
    bare.load_state_dict(reference.transformer.state_dict())
    for block in bare.h:
        block.attn.register_buffer("bias", torch.ones(1, 1, 40, 40))
        block.attn.register_buffer("masked_bias", torch.tensor(-1e4))
    bare.save_pretrained(tmp_path)
    model = ours(tmp_path, torch.float64)
    assert (our_logits(model, tokens) - widened(reference)(tokens).logits).abs().max() <= 1e-10
