"""Our model against transformers' on the same weights: a trained Llama, and random ones of many shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from megatron.kernels.runs import Documents
from megatron.model.config import ModelConfig
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank
from megatron.utils.errors import ConfigError

from .oracle import compare_with_reference, our_logits, ours, random_llama, random_tokens, widened

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"num_key_value_heads": 4},
    "grouped": {},
    "one key/value head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "tied, grouped, odd vocabulary": {"tie_word_embeddings": True, "vocab_size": 97},
    "heads wider than hidden / heads": {"head_dim": 20},
    "heads narrower than hidden / heads": {"head_dim": 2, "num_attention_heads": 8, "num_key_value_heads": 4},
    "hidden size, heads and width all unrelated": {"hidden_size": 36, "head_dim": 6},
    "one odd feed-forward layer": {"num_hidden_layers": 1, "intermediate_size": 37},
    "code Llama's rotary base": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "large eps": {"rms_norm_eps": 1e-2},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "vocabulary of one more than a block": {"vocab_size": 65},
}
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# The heads are 32 wide, so that waves of all lengths occur; the model's own length is 64, the sequences' 24.
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "linear, by its older name": {"type": "linear", "factor": 4.0},
    "dynamic, within the length": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic, beyond the length": {"type": "dynamic", "factor": 3.0, "longest": 10},
    "llama3": {"rope_type": "llama3", **LLAMA_3, "original_max_position_embeddings": 20, "rope_theta": 5e5},
    "llama3, other bounds": {
        "rope_type": "llama3", "factor": 32, "low_freq_factor": 2, "high_freq_factor": 3,
        "original_max_position_embeddings": 50,
    },
    "llama3, pretrained on its own length": {"rope_type": "llama3", **LLAMA_3},
    "yarn": YARN,
    "yarn, own factor of attention": {**YARN, "attention_factor": 1.3},
    "yarn, two scales": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, one scale": {**YARN, "mscale": 0.7},
    "yarn, other bounds": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5},
    "yarn, bounds not rounded": {**YARN, "truncate": False, "beta_fast": 6},
    "yarn, bounds that meet": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "yarn, pretrained on its own length": {"rope_type": "yarn", "factor": 2.0},
    "yarn, factor of the two lengths": {**YARN, "factor": None},
}  # fmt: skip


@pytest.fixture
def stories(shared: Path) -> Path:
    """A small Llama that was really trained, as a Hugging Face folder."""
    return shared / "data" / "stories260K-untied"


@pytest.fixture
def golden(shared: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens [1, s], logits [s, v]) of three prompts, from a forward pass in float64 of independent origin."""
    stored = np.load(shared / "data" / "stories260K" / "golden_logits_f64.npz")
    pairs = [
        (torch.from_numpy(stored[f"ids{i}"]).long()[None], torch.from_numpy(stored[f"logits{i}"])) for i in range(3)
    ]
    prompts = json.loads((shared / "data" / "stories260K" / "golden.json").read_text())["prompts"]
    assert [tokens[0].tolist() for tokens, _ in pairs] == [prompt["ids"] for prompt in prompts]
    return pairs


@torch.no_grad()
def test_trained_llama_gives_the_golden_logits(stories: Path, golden) -> None:
    single, double = ours(stories, torch.float32), ours(stories, torch.float64)
    for tokens, logits in golden:
        assert (our_logits(single, tokens)[0] - logits).abs().max() <= 1e-4
        # The stored logits are float32, of a size up to 20 or so: their own rounding is about 1e-6.
        assert (our_logits(double, tokens)[0] - logits).abs().max() <= 1e-5


@torch.no_grad()
def test_trained_llama_continues_as_the_golden_text(stories: Path, shared: Path) -> None:
    expected = json.loads((shared / "data" / "stories260K" / "golden.json").read_text())["greedy_ids_from_bos"]
    logits = our_logits(ours(stories, torch.float32), torch.tensor([expected[:-1]]))[0]
    assert logits.argmax(-1).tolist() == expected[1:]


@torch.no_grad()
def test_trained_llama_gives_the_logits_of_transformers(stories: Path, golden) -> None:
    reference = LlamaForCausalLM.from_pretrained(stories, dtype=torch.float32)
    model = ours(stories, torch.float32)
    longest = random_tokens(512, batch=2, length=512)
    for tokens in [tokens for tokens, _ in golden] + [longest]:
        assert (our_logits(model, tokens) - reference(tokens).logits).abs().max() <= 1e-5


@torch.no_grad()
def test_trained_llama_equals_the_float64_reference(stories: Path, golden) -> None:
    reference = widened(LlamaForCausalLM.from_pretrained(stories, dtype=torch.float32))
    model = ours(stories, torch.float64)
    for tokens in [tokens for tokens, _ in golden] + [random_tokens(512, batch=2, length=512)]:
        assert (our_logits(model, tokens) - reference(tokens).logits).abs().max() <= 1e-10


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES.keys())
def test_random_llamas_equal_the_float64_reference(tmp_path: Path, fields: dict[str, Any]) -> None:
    compare_with_reference(tmp_path, random_llama(**fields))


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_scaled_angles_equal_the_float64_reference(tmp_path: Path, scaling: dict[str, Any]) -> None:
    parameters = {"rope_theta": 1e4, **scaling}
    longest = parameters.pop("longest", 64)
    reference = random_llama(rope_parameters=parameters, head_dim=32, max_position_embeddings=longest)
    compare_with_reference(tmp_path, reference)
    plain = random_llama(rope_parameters={"rope_type": "default", "rope_theta": parameters["rope_theta"]}, head_dim=32)
    tokens = random_tokens(96)
    difference = (our_logits(ours(tmp_path, torch.float64), tokens) - widened(plain)(tokens).logits).abs().max()
    assert (difference <= 1e-10) == (scaling == SCALINGS["dynamic, within the length"])


@torch.no_grad()
def test_dynamic_angles_are_those_of_each_length(tmp_path: Path) -> None:
    """Whatever lengths came before; transformers keeps the angles of the longest sequence so far, a new model each."""
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    random_llama(rope_parameters=parameters, max_position_embeddings=8).save_pretrained(tmp_path)
    model = ours(tmp_path, torch.float64)
    for length in (6, 24, 12, 16, 24, 7):
        tokens = random_tokens(96, length=length)
        reference = widened(random_llama(rope_parameters=dict(parameters), max_position_embeddings=8))
        assert (our_logits(model, tokens) - reference(tokens).logits).abs().max() <= 1e-10


def test_dynamic_angles_of_documents_are_refused_where_they_would_differ() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    sizes = {
        "vocab_size": 9,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    config = ModelConfig.from_huggingface({**sizes, "rope_parameters": scaling, "max_position_embeddings": 8})
    model, tokens = Transformer(config, single_rank()), torch.zeros(1, 9, dtype=torch.long)
    starts = torch.zeros(1, 9, dtype=torch.int32)
    model(tokens[:, :8], documents=Documents(starts[:, :8], 1))
    with pytest.raises(ConfigError, match=r"max_position_embeddings=8.*a sample of 9 tokens.*at most 8 tokens"):
        model(tokens, documents=Documents(starts, 1))


@settings(max_examples=25)
@given(st.data())
def test_any_shape_equals_the_float64_reference(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    key_value_heads = data.draw(st.integers(1, 4), label="key/value heads")
    heads = key_value_heads * data.draw(st.integers(1, 3), label="query heads to each")
    fields = {
        "num_key_value_heads": key_value_heads,
        "num_attention_heads": heads,
        "head_dim": 2 * data.draw(st.integers(1, 9), label="half of the head's size"),
        # transformers wants a multiple of the heads here, even where head_dim is given
        "hidden_size": heads * data.draw(st.integers(1, 6), label="hidden size / heads"),
        "intermediate_size": data.draw(st.integers(1, 60), label="feed-forward size"),
        "num_hidden_layers": data.draw(st.integers(1, 4), label="layers"),
        "vocab_size": data.draw(st.integers(3, 200), label="vocabulary"),
        "tie_word_embeddings": data.draw(st.booleans(), label="tied"),
        "rms_norm_eps": data.draw(st.sampled_from([1e-6, 1e-5, 1e-3]), label="eps"),
        "rope_parameters": {"rope_type": "default", "rope_theta": data.draw(st.floats(10.0, 1e7), label="theta")},
    }
    seed = data.draw(st.integers(0, 99), label="seed")
    compare_with_reference(tmp_path_factory.mktemp("llama"), random_llama(seed, **fields))


FAULTS: dict[str, dict[str, Any]] = {
    "rotary base x 2": {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
    "eps": {"rms_norm_eps": 1e-6},
}


@torch.no_grad()
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_the_comparison_sees_a_wrong_constant(tmp_path: Path, fault: dict[str, Any]) -> None:
    """The same weights under another constant are far outside what the comparisons above allow."""
    random_llama().save_pretrained(tmp_path)
    other = random_llama(**fault)
    tokens = random_tokens(96)
    assert (our_logits(ours(tmp_path, torch.float32), tokens) - other(tokens).logits).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("fault", ["rotary pairs of neighbours", "gate and up exchanged"])
def test_the_comparison_sees_a_wrong_function(tmp_path: Path, fault: str) -> None:
    random_llama().save_pretrained(tmp_path)
    reference, tokens = random_llama(), random_tokens(96)
    if fault == "gate and up exchanged":
        mlp = reference.model.layers[1].mlp
        mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    else:
        weight = reference.model.layers[0].self_attn.q_proj.weight  # [4 heads x 8, 32]
        weight.copy_(weight.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32))
    theirs = widened(reference)(tokens).logits
    assert (our_logits(ours(tmp_path, torch.float64), tokens) - theirs).abs().max() > 1e-2


@torch.no_grad()
def test_both_spellings_of_config_json_are_read_alike(tmp_path: Path) -> None:
    model = random_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    model.save_pretrained(tmp_path)
    tokens = random_tokens(96)
    expected = our_logits(ours(tmp_path, torch.float64), tokens)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("rope_parameters")["rope_theta"] == 5e5, "transformers 5 writes the newer spelling"
    config.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5, "torch_dtype": "float32"}))
    assert torch.equal(our_logits(ours(tmp_path, torch.float64), tokens), expected)
    (tmp_path / "config.json").write_text(json.dumps(config))  # no base at all: not the same function
    assert not torch.equal(our_logits(ours(tmp_path, torch.float64), tokens), expected)


@torch.no_grad()
def test_sharded_folders_are_read(tmp_path: Path) -> None:
    model = random_llama()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    tokens = random_tokens(96)
    one, many = (our_logits(ours(tmp_path / name, torch.float32), tokens) for name in ("one", "many"))
    assert torch.equal(one, many)


@torch.no_grad()
def test_bf16_stays_near_float64(tmp_path: Path) -> None:
    """In bf16 there is no exact oracle, but norm statistics, rotary angles and softmax kept wide keep it near."""
    reference = random_llama()
    reference.bfloat16().save_pretrained(tmp_path)
    tokens = random_tokens(96)
    exact = widened(reference)(tokens).logits
    mine = our_logits(ours(tmp_path, torch.bfloat16), tokens).double()
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(tokens).logits.double()
    assert (mine - exact).square().mean().sqrt() <= 1.5 * (theirs - exact).square().mean().sqrt()
