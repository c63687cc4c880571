"""Adapters equal PEFT's on transformers' models: logits and gradients in float64, from PEFT's own files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

from megatron.checkpoint.adapted import lora_of, open_adapter
from megatron.config.lora import LoraConfig
from megatron.model.config import ModelConfig
from megatron.model.flops import model_flops_per_token
from megatron.model.initialize import initialize
from megatron.model.lora import UP, Lora, adapt, adapter_values, find_targets, make_lora, names_of_targets
from megatron.model.specs import adapter_shapes, count_adapters
from megatron.model.transformer import Transformer
from megatron.parallel.layers import ShardedParameter
from megatron.parallel.layout import Region
from megatron.parallel.mesh import single_rank
from megatron.utils.errors import ConfigError

from .oracle import our_logits, ours, random_gpt2, random_llama, random_tokens, widened
from .zoo import tiny

LLAMA = ModelConfig(96, 32, 56, 2, 4, 2, 8)
PEFT_MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama, all layers": (random_llama, {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
    "llama with biases, two layers, rslora": (
        lambda: random_llama(attention_bias=True, mlp_bias=True),
        {"r": 3, "lora_alpha": 2, "target_modules": ["k_proj", "up_proj"], "use_rslora": True},
    ),
    "gpt2, one c_proj": (random_gpt2, {"r": 2, "lora_alpha": 1, "target_modules": ["c_attn", "mlp.c_proj"]}),
    "pythia": (
        lambda: tiny("gpt_neox", {"intermediate_size": 56}),
        {"r": 5, "lora_alpha": 5, "target_modules": ["query_key_value", "dense_4h_to_h"]},
    ),
}


@pytest.mark.parametrize(("make", "settings"), PEFT_MODELS.values(), ids=PEFT_MODELS.keys())
def test_adapters_equal_those_of_peft(tmp_path: Path, make: Any, settings: dict[str, Any]) -> None:
    base = make()
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    peft = get_peft_model(widened(base), PeftConfig(**settings, init_lora_weights=False, task_type="CAUSAL_LM"))
    peft.double().save_pretrained(tmp_path / "adapter")
    model = ours(tmp_path / "base", torch.float64)
    with open_adapter(tmp_path / "adapter") as stored:
        adapt(model, lora_of(stored, model.config))
        for region, view in adapter_regions(model):
            stored.read(region, view)

    tokens, labels = random_tokens(96), random_tokens(96, seed=2)
    theirs = peft(tokens).logits
    F.cross_entropy(theirs.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    assert (our_logits(model, tokens) - theirs).abs().max() <= 1e-10
    model(tokens, labels=labels).backward()
    found: dict[str, torch.Tensor] = {}
    for region, view in adapter_regions(model, gradients=True):
        found.setdefault(region.name, torch.full(region.shape, torch.nan).double())[region.slices] = view
    expected = {name: parameter.grad for name, parameter in peft.named_parameters() if parameter.requires_grad}
    assert len(found) == len(expected) > 0
    for name, gradient in expected.items():
        own = found[name.removeprefix("base_model.model.").replace(".default.", ".")]
        assert gradient.abs().max() > 0, name
        assert (own - gradient).abs().max() <= 1e-11 * gradient.abs().max(), name


def adapter_regions(model: Transformer, *, gradients: bool = False) -> Iterator[tuple[Region, torch.Tensor]]:
    """The adapters of a model on one rank, or their gradients; what has a gradient is an adapter."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, ShardedParameter)
        assert not gradients or (parameter.grad is not None) == ("adapter" in name), name
        if "adapter" in name:
            values = parameter.grad if gradients else parameter.detach()
            assert values is not None
            yield from parameter.spec.regions(values)


def test_adapters_begin_as_in_peft() -> None:
    """A is uniform within 1/√in, as torch begins a linear layer; B is zero, so nothing changes at first."""
    lora = make_lora(LoraConfig(rank=8), LLAMA)
    assert lora.scale == 1.0 and lora.targets == (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
    model = Transformer(LLAMA, single_rank())
    initialize(model, LLAMA, seed=5)
    tokens = random_tokens(96)
    before = our_logits(model, tokens)
    adapt(model, lora)
    fill = adapter_values(LLAMA, seed=5)
    downs = []
    for region, view in adapter_regions(model):
        view.fill_(torch.nan)
        fill(region, view)
        if region.name.endswith(UP):
            assert (view == 0).all()
        else:
            downs.append(view.flatten() * math.sqrt(region.shape[1]))
    scaled = torch.cat(downs)
    assert scaled.abs().max() <= 1.0 and scaled.var() == pytest.approx(1 / 3, rel=0.05)
    assert len({float(values[0]) for values in downs}) == len(downs)
    assert torch.equal(our_logits(model, tokens), before)


def test_shapes_and_numbers_of_adapters() -> None:
    lora = Lora(4, 2.0, True, ("self_attn.k_proj", "mlp.down_proj"))
    shapes = adapter_shapes(LLAMA, lora)
    assert lora.scale == 1.0 and len(shapes) == 2 * 2 * 2
    assert shapes["model.layers.1.self_attn.k_proj.lora_A.weight"] == (4, 32)
    assert shapes["model.layers.1.self_attn.k_proj.lora_B.weight"] == (16, 4)
    assert shapes["model.layers.0.mlp.down_proj.lora_A.weight"] == (4, 56)
    assert count_adapters(LLAMA, lora) == 2 * (4 * (32 + 16) + 4 * (56 + 32)) and count_adapters(LLAMA, None) is None
    # Of the products of frozen weights only two in three are taken; attention's own cost what they did.
    every, none = model_flops_per_token(LLAMA, 64), model_flops_per_token(LLAMA, 0)
    assert model_flops_per_token(LLAMA, 64, adapters=0) == pytest.approx(every - none / 3)
    assert model_flops_per_token(LLAMA, 64, adapters=50) == pytest.approx(every - none / 3 + 300)


def test_layers_are_named_by_their_last_names_where_these_are_clear() -> None:
    gpt2 = ModelConfig.from_settings(
        {"model_type": "gpt2", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    )
    assert find_targets(["c_proj"], gpt2) == ("attn.c_proj", "mlp.c_proj")
    assert names_of_targets(("attn.c_proj", "mlp.c_proj"), gpt2) == ["c_proj"]
    assert names_of_targets(("mlp.c_proj",), gpt2) == ["mlp.c_proj"]
    with pytest.raises(ConfigError, match=r"q_proj, which a layer of model_type=gpt2 has not; .* c_attn, c_proj, c_fc"):
        find_targets(["q_proj", "c_attn"], gpt2)
