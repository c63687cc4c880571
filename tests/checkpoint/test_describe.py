"""`megatron inspect` on models, checkpoints and token files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from megatron.__main__ import main
from megatron.model.config import ModelConfig
from megatron.model.specs import canonical_shapes

from .conftest import CONFIG, save


def _shown(text: str) -> dict[str, str]:
    """The table as label -> text."""
    return dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines())


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A save folder with steps 4 and 8 of a small Llama, saved by three ranks."""
    shapes = canonical_shapes(ModelConfig.from_huggingface(CONFIG))
    weights = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    moments = {name: tensor.float() for name, tensor in weights.items()}
    for step in (4, 8):
        tensors = {"weights": weights, "master": moments, "exp_avg": moments, "exp_avg_sq": moments}
        state = {"consumed_tokens": 4096, "consumed_samples": 64, "grid": {"tensor": 2, "pipeline": 1, "data": 3}}
        yaml = "parallel:\n  tensor: 2\n  pipeline: 1\n  zero: null\n"
        errors = save(tmp_path / "save", tensors, step=step, ranks=3, cuts=2, carried={"tokenizer.model": b"pieces"},
                      state=state, run_config=yaml)  # fmt: skip
        assert errors == [None] * 3
    return tmp_path / "save"


def test_a_save_folder(trained: Path, capsys) -> None:
    assert main(["inspect", str(trained)]) == 0
    shown = _shown(capsys.readouterr().out)
    assert shown == {
        "folder": str(trained / "step_0000008"),
        "format": "checkpoint of this program",
        "steps there": "4, 8",
        "step": "8",
        "consumed tokens": "4,096 (4.10 k)",
        "consumed samples": "64 (64)",
        "saved with": "tensor 2, pipeline 1, zero 1, data 3",
        "vocab size": "40",
        "hidden size": "16",
        "intermediate size": "24",
        "num hidden layers": "3",
        "num attention heads": "4",
        "num key value heads": "2",
        "head dim": "4",
        "max position embeddings": "64",
        "rms norm eps": "1e-06",
        "rope theta": "10000.0",
        "tie word embeddings": "False",
        "initializer range": "0.02",
        "model type": "llama",
        "hidden act": "silu",
        "query key value bias": "False",
        "attention output bias": "False",
        "mlp bias": "False",
        "query key norm": "False",
        "full attention layers": "()",
        "partial rotary factor": "1.0",
        "alibi": "False",
        "parameters": "7,152 (7.15 k)",
        "weights": "30 tensors in BF16",
        "weight files": "3, 14.0 KiB: weights-00000.safetensors … weights-00002.safetensors",
        "optimizer state": "master, exp_avg, exp_avg_sq, 83.8 KiB",
        "other files": "tokenizer.model",
    }


def test_for_machines(trained: Path, capsys) -> None:
    assert main(["inspect", str(trained / "step_0000004"), "--json", "--tensors", "--verify"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["step"], content["parameters"], content["format"]) == (4, 7152, "native")
    assert content["optimizer_bytes"] == dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), 4 * 7152)
    assert content["saved_with"] == {"tensor": 2, "pipeline": 1, "data": 3, "zero": 1}, "zero as it was, not null"
    assert content["verified"] == "the checksums of all 15 files are right"
    assert len(content["tensor_list"]) == 4 * 30
    embedding = next(entry for entry in content["tensor_list"] if entry["name"] == "model.embed_tokens.weight")
    assert (embedding["kind"], embedding["shape"], embedding["dtype"]) == ("weights", [40, 16], "BF16")


def test_damage_is_found_on_request(trained: Path, capsys) -> None:
    file = trained / "step_0000008" / "optimizer-exp_avg-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["inspect", str(trained)]) == 0
    assert main(["inspect", str(trained), "--verify"]) == 2
    assert "optimizer-exp_avg-00001.safetensors is damaged: its checksum is not the one" in capsys.readouterr().err


def test_a_huggingface_folder(shared: Path, capsys) -> None:
    folder = shared / "data" / "stories260K-untied"
    assert main(["inspect", str(folder), "--verify", "--tensors"]) == 0
    text = capsys.readouterr().out
    shown = _shown(text)
    assert shown["format"] == "Hugging Face" and "step" not in shown and "problem" not in shown
    assert shown["parameters"] == "292,800 (293 k)"
    assert shown["optimizer state"] == "none"
    assert shown["other files"] == "tokenizer.model, tokenizer_config.json"
    assert "no checksums to compare" in shown["verified"]
    assert "weights     model.norm.weight                                 F32   64\n" in text


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"hidden_act": "gelu"}, "hidden_act='gelu'"), ({"num_hidden_layers": 4}, "9 missing: model.layers.3.")],
)
def test_a_model_that_cannot_be_used_is_still_described(trained: Path, capsys, change: dict, problem: str) -> None:
    path = trained / "step_0000008" / "config.json"
    text = json.dumps({**CONFIG, **change}, separators=(",", ":"))
    size = path.stat().st_size
    path.write_text(text + " " * (size - len(text)))
    assert main(["inspect", str(trained)]) == 0
    shown = _shown(capsys.readouterr().out)
    assert problem in shown["problem"] and shown["parameters"] == "7,152 (7.15 k)"


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_token_files(shared: Path, capsys, ending: str) -> None:
    prefix = shared / "data" / "megatron" / "meg-gpt2-openwebtext_text_document"
    assert main(["inspect", f"{prefix}{ending}"]) == 0
    text = capsys.readouterr().out
    assert "1,361,845" in text and "1,000" in text
    assert main(["inspect", f"{prefix}{ending}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 1000
    assert main(["inspect", f"{prefix}{ending}", "--verify"]) == 0
    assert main(["inspect", f"{prefix}{ending}", "--tensors"]) == 2


def test_what_is_nothing(tmp_path: Path, capsys) -> None:
    assert main(["inspect", str(tmp_path / "absent")]) == 2
    assert "does not exist: give a folder, or the prefix of a .bin/.idx pair" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is neither a model nor a checkpoint" in capsys.readouterr().err
