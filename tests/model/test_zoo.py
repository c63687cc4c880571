"""Every variation of every family: equal to transformers', and the same after a way through our format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron.checkpoint.convert import convert
from megatron.model.config import ModelConfig
from megatron.model.specs import canonical_shapes

from .oracle import compare_with_reference, our_logits, ours, random_tokens, widened
from .zoo import ZOO, tiny


@pytest.mark.parametrize(("model_type", "fields"), ZOO.values(), ids=ZOO.keys())
def test_a_model_equals_the_float64_reference(tmp_path: Path, model_type: str, fields: dict[str, Any]) -> None:
    compare_with_reference(tmp_path, tiny(model_type, fields))


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "fields"), ZOO.values(), ids=ZOO.keys())
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, model_type: str, fields: dict[str, Any]) -> None:
    """Hugging Face, ours, Hugging Face; transformers computes the same bits with the `config.json` that was carried
    along, and the same function with one that is written from what we understood of it."""
    reference = tiny(model_type, fields)
    reference.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.view(torch.int32), after[name].view(torch.int32)) for name, tensor in before.items())
    expected = _logits(reference)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "back")), expected)
    stated = json.loads((tmp_path / "back" / "config.json").read_text())
    config = ModelConfig.from_huggingface(stated)
    for generation in (
        None,
        ("rope_parameters", "dtype"),
        ("rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct"),
    ):
        written = {name: value for name, value in config.to_huggingface().items() if name not in (generation or ())}
        assert ModelConfig.from_huggingface(written) == config
        (tmp_path / "back" / "config.json").write_text(json.dumps(written))
        found = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "back"))
        assert (found - expected).abs().max() <= 1e-5, generation
    assert config.num_parameters == sum(torch.Size(shape).numel() for shape in canonical_shapes(config).values())


def _logits(model: PreTrainedModel) -> torch.Tensor:
    return model(random_tokens(96)).logits


# What makes a difference: the weights of one model under the configuration of another.
FAULTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a window of one more": ("mistral", "mistral, window", {"sliding_window": 8}),
    "no window": ("mistral", "mistral, window", {"sliding_window": None}),
    "a window in one layer more": ("qwen2", "qwen2, window in the later layers", {"max_window_layers": 0}),
    "half of each head turned": ("gpt_neox", "gpt_neox, Pythia", {"rotary_pct": 0.5}),
    "one after the other": ("gpt_neox", "gpt_neox, Pythia", {"use_parallel_residual": False}),
    "no ALiBi": ("falcon", "falcon, RefinedWeb", {"alibi": False}),
    "eps of queries and keys": ("qwen3", "qwen3, one key/value head, large eps", {"rms_norm_eps": 1e-5}),
}


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "name", "fault"), FAULTS.values(), ids=FAULTS.keys())
def test_the_comparison_sees_another_function(
    tmp_path: Path, model_type: str, name: str, fault: dict[str, Any]
) -> None:
    fields = ZOO[name][1]
    tiny(model_type, fields).save_pretrained(tmp_path)
    other, tokens = widened(tiny(model_type, {**fields, **fault})), random_tokens(96)
    assert (our_logits(ours(tmp_path, torch.float64), tokens) - other(tokens).logits).abs().max() > 1e-4
