"""PEFT's folders: what PEFT computes is what their merged models compute, and other functions are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron.__main__ import main
from megatron.checkpoint.adapted import open_adapter
from megatron.checkpoint.convert import convert
from megatron.checkpoint.source import open_source, what_makes_it_a_model
from megatron.utils.errors import CheckpointError
from tests.model.oracle import our_logits, ours, random_gpt2, random_llama, random_tokens
from tests.model.zoo import tiny

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "llama": (random_llama, {"target_modules": "all-linear", "lora_alpha": 5}),
    "llama, two layers and the head": (
        random_llama,
        {"target_modules": ["o_proj", "gate_proj", "lm_head"], "layers_to_transform": [1], "use_rslora": True},
    ),
    "gpt2": (random_gpt2, {"target_modules": ["c_attn", "c_fc", "mlp.c_proj"]}),
    "falcon": (
        lambda: tiny("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        {"target_modules": ["query_key_value", "dense"]},
    ),
}


def save_peft(base: PreTrainedModel, folder: Path, **settings: Any) -> PeftModel:
    """Save a model to `base` and random adapters of it to `adapter`; returns PEFT's model."""
    base.save_pretrained(folder / "base")
    torch.manual_seed(3)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        LoraConfig(**{"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **settings}),
    )
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return adapted.eval()


@torch.no_grad()
@pytest.mark.parametrize(("make", "settings"), MODELS.values(), ids=MODELS.keys())
def test_a_merged_model_computes_what_peft_computes(
    tmp_path: Path, make: Callable[[], PreTrainedModel], settings: dict[str, Any]
) -> None:
    reference, tokens = save_peft(make(), tmp_path, **settings), random_tokens(96)
    expected = reference(tokens).logits
    convert(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with reference.disable_adapter():
        assert (reference(tokens).logits - expected).abs().max() > 1e-2
    for found in (
        merged(tokens).logits,
        our_logits(ours(tmp_path / "adapter", torch.float32), tokens),
        our_logits(ours(tmp_path / "merged", torch.float32), tokens),
    ):
        assert (found - expected).abs().max() <= 2e-5
    rest = load_file(tmp_path / "base" / "model.safetensors")
    keys = load_file(tmp_path / "adapter" / WEIGHTS)
    adapted = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in keys}
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert torch.equal(tensor, rest[name]) == (name.removesuffix(".weight") not in adapted), name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama in `base` and adapters of all its layers in `adapter`. Not to be changed."""
    folder = tmp_path_factory.mktemp("peft")
    save_peft(random_llama(), folder, target_modules="all-linear", lora_alpha=6)
    return folder


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    """A copy of these adapters, to be changed."""
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


SETTINGS: dict[str, dict[str, Any]] = {
    "use_dora=True": {"use_dora": True},
    "peft_type=LOHA": {"peft_type": "LOHA"},
    "bias=all": {"bias": "all"},
    "lora_bias=True": {"lora_bias": True},
    r"modules_to_save=\['lm_head'\]": {"modules_to_save": ["lm_head"]},
    r"rank_pattern=\{'q_proj': 8\}": {"rank_pattern": {"q_proj": 8}},
    r"alpha_pattern=\{'q_proj': 8\}": {"alpha_pattern": {"q_proj": 8}},
    "init_lora_weights=pissa_niter_4, which changes": {"init_lora_weights": "pissa_niter_4"},
    "r=0": {"r": 0},
    "r='4'": {"r": "4"},
    "lora_alpha=None": {"lora_alpha": None},
    "invented_next_year=2": {"invented_next_year": 2},
}


@pytest.mark.parametrize(("message", "changed"), SETTINGS.items(), ids=SETTINGS.keys())
def test_another_function_is_refused(adapter: Path, message: str, changed: dict[str, Any]) -> None:
    stated = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**stated, **changed}))
    with pytest.raises(CheckpointError, match=f"asks for what is not supported: {message}"):
        open_adapter(adapter)


def test_a_pattern_that_says_the_same_is_none(adapter: Path) -> None:
    stated = json.loads((adapter / CONFIG).read_text())
    same = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"o_proj": 6}, "init_lora_weights": "gaussian"}
    (adapter / CONFIG).write_text(json.dumps({**stated, **same}))
    open_adapter(adapter).close()


def without(tensors: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != key}


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "one factor": (lambda all: without(all, f"{FIRST}.lora_B.weight"), "is there without .*q_proj.lora_B.weight"),
    "another rank": (
        lambda all: {**all, f"{FIRST}.lora_A.weight": torch.ones(5, 32)},
        r"lora_A.weight has shape \[5, 32\], not \[4, 32\]",
    ),
    "another width": (
        lambda all: {**all, f"{FIRST}.lora_B.weight": torch.ones(33, 4)},
        r"lora_B.weight has shape \[33, 4\], not \[32, 4\]",
    ),
    "whole numbers": (
        lambda all: {**all, f"{FIRST}.lora_A.weight": torch.ones(4, 32, dtype=torch.int32)},
        "lora_A.weight is of torch.int32",
    ),
    "an embedding": (
        lambda all: {**all, "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 96)},
        "embed_tokens.lora_embedding_A is no adapter of a linear layer",
    ),
    "a head of its own": (
        lambda all: {**all, "base_model.model.lm_head.base_layer.weight": torch.ones(96, 32)},
        "lm_head.base_layer.weight is no adapter of a linear layer",
    ),
    "a layer that is not there": (
        lambda all: {**all, "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 32)},
        "layers.7.mlp.up_proj.lora_A.weight belongs to no linear layer",
    ),
    "nothing": (lambda all: {}, "there are no tensors"),
}


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS.keys())
def test_adapters_of_another_model_are_refused(made: Path, adapter: Path, change: Any, message: str) -> None:
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"do not fit the model in .*{message}"):
        convert(made / "base", adapter.parent / "merged", adapter=adapter)
    assert not (adapter.parent / "merged").exists()


def test_a_factor_that_is_there_twice_is_refused(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    other = f"{FIRST}.lora_A.weight".removeprefix("base_model.model.")
    save_file({**tensors, other: torch.zeros(4, 32)}, adapter / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"holds .*q_proj\.lora_A\.weight twice"):
        open_adapter(adapter)


def test_a_head_that_is_the_embedding_has_no_adapter(tmp_path: Path) -> None:
    """What a file keeps as its copy is not read: the adapter would be lost."""
    save_peft(random_llama(), tmp_path, target_modules=["lm_head"])
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"lm_head\.lora_A\.weight belongs to no linear layer"):
        open_source(tmp_path / "adapter")


@pytest.mark.parametrize("damage", [CONFIG, WEIGHTS, "no config", "no weights"])
def test_damaged_folders_are_errors(adapter: Path, damage: str) -> None:
    if damage == "no config":
        (adapter / CONFIG).unlink()
    elif damage == "no weights":
        (adapter / WEIGHTS).unlink()
    else:
        (adapter / damage).write_bytes((adapter / damage).read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=str(adapter)):
        open_adapter(adapter)


def test_a_base_that_is_not_there_is_named(adapter: Path) -> None:
    stated = json.loads((adapter / CONFIG).read_text())
    for base, message in (
        (
            "someone/somewhere",
            "are for someone/somewhere, which is no folder.*convert MODEL DST --adapter",
        ),
        (None, "do not say which model they are for"),
        (str(adapter), "say that they are for themselves"),
    ):
        (adapter / CONFIG).write_text(json.dumps({**stated, "base_model_name_or_path": base}))
        with pytest.raises(CheckpointError, match=message):
            open_source(adapter)


def test_adapters_on_adapters(made: Path, adapter: Path) -> None:
    """Their model is made by others; in a circle there is none."""
    upper = adapter.parent / "upper"
    shutil.copytree(adapter, upper)
    stated = json.loads((adapter / CONFIG).read_text())
    (upper / CONFIG).write_text(json.dumps({**stated, "base_model_name_or_path": str(adapter)}))
    convert(made / "base", upper.parent / "once", adapter=adapter)
    convert(upper.parent / "once", upper.parent / "twice", to="huggingface", adapter=adapter)
    convert(upper, upper.parent / "at once")
    once, twice = (load_file(upper.parent / name / "model.safetensors") for name in ("at once", "twice"))
    assert all((tensor - twice[name]).abs().max() <= 1e-6 for name, tensor in once.items())
    (adapter / CONFIG).write_text(json.dumps({**stated, "base_model_name_or_path": str(upper)}))
    with pytest.raises(CheckpointError, match="say that they are for themselves"):
        open_source(upper)


def test_adapters_beside_a_model_are_left_alone_with_a_notice(
    made: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert what_makes_it_a_model(adapter) == CONFIG, "no place for checkpoints"
    shutil.copytree(made / "base", adapter, dirs_exist_ok=True)
    assert main(["diff", str(adapter), str(made / "base")]) == 0
    assert "holds adapters beside a model: they are left alone" in capsys.readouterr().err
    assert main(["convert", str(made / "base"), str(adapter.parent / "merged"), "--adapter", str(adapter)]) == 0
    assert main(["diff", str(adapter.parent / "merged"), str(made / "adapter")]) == 0


def test_old_folders_hold_a_pickle(made: Path, adapter: Path) -> None:
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    tokens = random_tokens(96)
    with torch.no_grad():
        found, expected = (our_logits(ours(folder, torch.float64), tokens) for folder in (adapter, made / "adapter"))
    assert torch.equal(found, expected)


def test_products_are_rounded_once(made: Path, tmp_path: Path) -> None:
    """Merged into bf16 the weights are those of float32, rounded: not sums of rounded parts."""
    for name, dtype in (("wide", torch.float32), ("narrow", torch.bfloat16)):
        convert(made / "base", tmp_path / name, adapter=made / "adapter", dtype=dtype)
    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "narrow"))
    assert all(torch.equal(tensor.bfloat16(), narrow[name]) for name, tensor in wide.items())


def test_the_command_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = str(made / "base"), str(made / "adapter")
    assert main(["convert", base, str(tmp_path / "cut"), "--adapter", adapter, "--to", "native", "--tensor", "2"]) == 0
    assert main(["convert", adapter, str(tmp_path / "merged")]) == 0
    assert main(["diff", str(tmp_path / "cut"), str(tmp_path / "merged")]) == 0
    assert main(["diff", adapter, str(tmp_path / "merged")]) == 0
    assert main(["diff", adapter, base]) == 1
    capsys.readouterr()
    assert main(["inspect", adapter]) == 0
    shown = capsys.readouterr().out
    assert "PEFT" in shown and "rank 4, alpha 6, for " in shown and "q_proj, " in shown and f" of {base}" in shown
    for words, message in (
        ([base, "--to", "peft"], "holds a model and no adapters"),
        ([adapter, "--to", "peft"], "writes the adapters of a run as they are"),
        ([base, "--adapter", base], "holds a model and no adapters"),
        ([base, "--adapter", adapter, "--verify", "text"], "--verify opens SRC and DST as models of the same weights"),
        ([adapter, "--extra-tokens", "<a>"], "do not go with adapters"),
    ):
        assert main(["convert", words[0], str(tmp_path / "never"), *words[1:]]) != 0
        assert message in capsys.readouterr().err
        assert not (tmp_path / "never").exists()
