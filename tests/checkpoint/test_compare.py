"""`megatron diff`: nothing that differs is passed over, and nothing else is reported."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from megatron.__main__ import main
from megatron.checkpoint import compare as compare_module
from megatron.checkpoint.compare import compare
from megatron.checkpoint.convert import convert
from megatron.checkpoint.source import open_source

from .conftest import CONFIG, save
from .test_convert import random_weights, write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", CONFIG, random_weights(CONFIG))


def diff(capsys, *words: str) -> tuple[int, dict]:
    capsys.readouterr()
    code = main(["diff", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("to", ["native", "megatron-llm", "meta", "huggingface"])
def test_a_conversion_is_equal_whatever_its_format(model: Path, tmp_path: Path, capsys, monkeypatch, to) -> None:
    monkeypatch.setattr(compare_module, "BLOCK_ELEMENTS", 50)
    grid = {} if to == "huggingface" else {"tensor": 2}
    convert(model, tmp_path / "other", to=to, **grid)
    if to == "meta":  # has no word for the longest sequence
        assert diff(capsys, model, tmp_path / "other")[1]["config"].keys() == {"max_position_embeddings"}
        return
    code, found = diff(capsys, model, tmp_path / "other")
    assert (code, found["different"], found["compared"], found["values"]) == (0, False, 30, [])
    assert main(["diff", str(model), str(tmp_path / "other")]) == 0
    assert capsys.readouterr().out == "equal: 30 tensors compared\n"


def test_one_changed_element_is_found(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(compare_module, "BLOCK_ELEMENTS", 50)
    weights = random_weights(CONFIG)
    name = "model.layers.2.mlp.up_proj.weight"
    before = float(weights[name][23, 15])
    weights[name][23, 15] = before + 4
    other = write_model(tmp_path / "other", CONFIG, weights)
    code, found = diff(capsys, model, other)
    (value,) = found["values"]
    assert code == 1 and (value["name"], value["differing"], value["numel"]) == (name, 1, 24 * 16)
    after = float(weights[name][23, 15])
    assert value["largest"] == abs(after - before)
    assert value["relative"] == pytest.approx(abs(after - before) / max(float(weights[name].abs().max()), abs(before)))
    assert diff(capsys, model, other, "--tolerance", "5")[0] == 0
    assert diff(capsys, model, other, "--tolerance", "3")[0] == 1
    assert main(["diff", str(model), str(other)]) == 1
    assert f"{name}: largest difference" in capsys.readouterr().out


def test_values_that_are_no_numbers(model: Path, tmp_path: Path, capsys) -> None:
    weights = random_weights(CONFIG)
    weights["model.norm.weight"][3] = torch.nan
    other = write_model(tmp_path / "other", CONFIG, weights)
    code, found = diff(capsys, model, other, "--tolerance", "1000")
    assert code == 1 and found["values"][0]["largest"] == "inf"
    assert diff(capsys, other, other)[0] == 0


def test_missing_tensors_shapes_dtypes_and_configurations(model: Path, tmp_path: Path, capsys) -> None:
    weights = random_weights(CONFIG)
    del weights["lm_head.weight"]
    weights["extra"] = torch.ones(1)
    weights["model.norm.weight"] = torch.ones(15)
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].float()
    other = write_model(tmp_path / "other", {**CONFIG, "rope_theta": 5e5, "rms_norm_eps": 1e-5}, weights)
    code, found = diff(capsys, model, other)
    assert code == 1
    assert found["missing"] == {"first": ["extra"], "second": ["lm_head.weight"]}
    assert found["shapes"] == ["model.norm.weight: [16] and [15]"]
    assert found["dtypes"] == ["model.embed_tokens.weight: BF16 and F32"]
    assert found["config"] == {"rms_norm_eps": [1e-6, 1e-5], "rope_theta": [10000.0, 500000.0]}
    assert found["values"] == []


def test_a_dtype_alone_counts_unless_there_is_a_tolerance(model: Path, tmp_path: Path, capsys) -> None:
    convert(model, tmp_path / "wide", dtype=torch.float32)
    assert diff(capsys, model, tmp_path / "wide")[0] == 1
    assert diff(capsys, model, tmp_path / "wide", "--tolerance", "0")[0] == 0


def test_optimizer_states_are_compared_where_both_have_them(tmp_path: Path, model: Path) -> None:
    weights = random_weights(CONFIG)
    moments = {name: tensor.float() for name, tensor in weights.items()}
    changed = {**moments, "lm_head.weight": moments["lm_head.weight"] + 1}
    for name, second in (("a", moments), ("b", changed)):
        tensors = {"weights": weights, "exp_avg": moments, "exp_avg_sq": second}
        save(tmp_path / name, tensors, ranks=3, cuts=4, chance=random.Random(name))
    with open_source(tmp_path / "a") as first, open_source(tmp_path / "b") as second, open_source(model) as third:
        found = compare(first, second)
        assert [(one.kind, one.name) for one in found.values] == [("exp_avg_sq", "lm_head.weight")]
        found = compare(first, third)
        assert not found.is_different() and found.notes == [f"only the first holds exp_avg{end}" for end in ("", "_sq")]
