"""Tokens added to a model mean the same from preprocessing over training to what transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.data.indexed import IndexedReader
from megatron.model.config import ModelConfig
from megatron.model.specs import canonical_shapes
from megatron.tokenizer import load_tokenizer
from tests.tokenizer.conftest import SENTENCE, train_sentencepiece

from .material import read_metrics, words
from .program import Program

PIECES = 340
TOKENS = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<image>", "[REF]"]


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_are_trained_and_exported(program: Program, tmp_path: Path, tied: bool) -> None:
    base, extended = tmp_path / "base", tmp_path / "extended"
    write_model(base, tied)
    program.run(["convert", base, extended, "--extra-tokens", ",".join(TOKENS), "--tensor", 2])
    texts = (json.dumps({"text": f"<image>{SENTENCE}[REF]{number} <SEP> {SENTENCE}"}) for number in range(40))
    (tmp_path / "text.jsonl").write_text("\n".join(texts))
    prepare = ["--tokenizer", extended, "--append-eod", "--eod-token", "<EOD>", "--workers", 1]
    program.run(["preprocess", "--input", tmp_path / "text.jsonl", "--output-prefix", tmp_path / "data", *prepare])
    first = IndexedReader(tmp_path / "data_text_document").read(0).tolist()
    assert (first[0], first.count(PIECES + 1), first[-1]) == (PIECES + 5, 1, PIECES + 2)

    settings = {
        "data.train": tmp_path / "data_text_document",
        "data.sequence_length": 32,
        "optimizer.learning_rate": 1e-2,
        "train.steps": 2,
        "train.global_batch": 4,
        "train.micro_batch": 2,
        "train.precision": "fp32",
        "parallel.tensor": 2,
        "checkpoint.save": tmp_path / "save",
        "log.dir": tmp_path / "log",
        "log.interval": 1,
    }
    refused = program.run(["train", *words({**settings, "model.init_from": base})], ranks=2, expect=2)
    assert "enlarge the model's vocabulary" in refused.errors
    program.run(["train", *words({**settings, "model.init_from": extended})], ranks=2)
    assert len(read_metrics(tmp_path / "log")) == 2

    program.run(["convert", tmp_path / "save", tmp_path / "hf"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = {token: PIECES + at for at, token in enumerate(TOKENS)}
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in TOKENS} == ids
    ours = load_tokenizer(tmp_path / "hf")
    assert ours.fingerprint == load_tokenizer(extended).fingerprint
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.vocab_size == len(tokenizer) == PIECES + 7
    with torch.no_grad():
        output = model(torch.tensor([first]), labels=torch.tensor([first]))
    assert output.logits.shape[-1] == PIECES + 7 and output.loss < read_metrics(tmp_path / "log")[0]["loss"]
    head = model.get_output_embeddings().weight.detach()
    assert not torch.equal(head[ids["<image>"]], head[ids["[REF]"]]), "both began as the mean"


def write_model(folder: Path, tied: bool) -> None:
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": PIECES,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
    }
    generator = torch.Generator().manual_seed(5)
    shapes = canonical_shapes(ModelConfig.from_huggingface(config))
    weights = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) / 4
        for name, shape in shapes.items()
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
