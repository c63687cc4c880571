"""A real trained model through every format and several grids: each time it computes what it computed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron.checkpoint.convert import convert
from megatron.checkpoint.source import open_source
from megatron.checkpoint.weights import load_weights
from megatron.model.config import ModelConfig
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank

from .test_convert import read_all, same

WAYS: dict[str, list[dict[str, Any]]] = {
    "pickle": [],
    "native": [{"to": "native", "tensor": 2, "pipeline": 2}],
    "native to native": [{"to": "native", "tensor": 4, "pipeline": 5}, {"to": "native", "tensor": 2}],
    "meta": [{"to": "meta"}],
    "meta in shards": [{"to": "meta", "tensor": 4}],
    "megatron-llm": [{"to": "megatron-llm"}],
    "megatron-llm on a grid": [{"to": "megatron-llm", "tensor": 4, "pipeline": 5}],
    "megatron-llm to another grid": [{"to": "megatron-llm", "tensor": 2}, {"to": "megatron-llm", "pipeline": 5}],
    "through all on grids of two": [
        {"to": "native", "tensor": 2, "pipeline": 2},
        {"to": "megatron-llm", "tensor": 2, "pipeline": 5},
        {"to": "meta", "tensor": 2},
        {"to": "huggingface"},
        {"to": "native", "tensor": 2, "pipeline": 2},
    ],
    "through all": [
        {"to": "meta", "tensor": 2},
        {"to": "megatron-llm", "tensor": 2, "pipeline": 5},
        {"to": "native", "tensor": 4, "pipeline": 3},
        {"to": "huggingface"},
    ],
}


@torch.no_grad()
def largest_deviation(folder: Path, data: Path) -> float:
    """Of the logits of three prompts from those of an independent forward pass in float64."""
    with open_source(folder) as source:
        model = Transformer(ModelConfig.from_huggingface(source.model_config), single_rank())
        load_weights(model, source)
    golden = np.load(data / "stories260K" / "golden_logits_f64.npz")
    deviations = []
    for prompt in range(3):
        tokens = torch.from_numpy(golden[f"ids{prompt}"].astype(np.int64))[None]
        logits = model(tokens).transpose(0, 1)[0, :, :512].double()
        deviations.append((logits - torch.from_numpy(golden[f"logits{prompt}"])).abs().max().item())
    return max(deviations)


@pytest.mark.parametrize("way", WAYS)
def test_golden_logits_through_every_format_and_grid(shared: Path, tmp_path: Path, way: str) -> None:
    data = shared / "data"
    original = folder = data / "stories260K-untied"
    if way == "pickle":
        folder = tmp_path / "pickle"
        folder.mkdir()
        shutil.copy(original / "config.json", folder)
        torch.save(load_file(original / "model.safetensors"), folder / "pytorch_model.bin")
    for number, step in enumerate(WAYS[way]):
        convert(folder, tmp_path / str(number), **step)
        folder = tmp_path / str(number)
    deviation = largest_deviation(folder, data)
    print(f"{way}: largest difference from the golden logits {deviation:.2e}")
    assert deviation <= 1e-4
    convert(folder, tmp_path / "back", to="huggingface")
    assert same(read_all(tmp_path / "back"), read_all(original))
