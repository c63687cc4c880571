"""Packed samples whose documents do not see each other: each document as if it were alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config.train import Recompute
from megatron.kernels import native
from megatron.kernels.runs import Documents
from megatron.model.config import ModelConfig
from megatron.model.initialize import initialize
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank

from .oracle import canonical_gradients, our_logits, ours, random_llama, widened

LENGTH = 24
# Of two samples: where documents begin. One of a single token, one that ends the sample, and a sample of one alone.
BEGINS: list[list[int]] = [[0, 5, 6, 13, 23], [0]]


def documents_of(begins: list[list[int]]) -> Documents:
    starts = torch.zeros(len(begins), LENGTH, dtype=torch.int32)
    for row, places in enumerate(begins):
        for start, stop in pairwise([*places, LENGTH]):
            starts[row, start:stop] = start
    return Documents(starts, max(map(len, begins)))


def random_ids(seed: int) -> torch.Tensor:
    return torch.randint(0, 96, (len(BEGINS), LENGTH), generator=torch.Generator().manual_seed(seed))


# Of `config.json`, besides the sizes.
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": 4, "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", "head_dim": 12, "num_key_value_heads": 1},
    "falcon": {"model_type": "falcon", "ffn_hidden_size": 48},
    "falcon with ALiBi": {"model_type": "falcon", "ffn_hidden_size": 48, "alibi": True, "parallel_attn": False},
    "pythia": {"model_type": "gpt_neox"},
}


def model_of(family: str, recompute: Recompute) -> Transformer:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2}  # fmt: skip
    if family == "llama":
        sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    if family in CONFIGS:
        config = ModelConfig.from_huggingface({**sizes, **CONFIGS[family]})
    else:
        config = ModelConfig.from_settings({"model_type": family, **sizes})
    model = Transformer(config, single_rank(), torch.float64, recompute=recompute)
    initialize(model, config, seed=5)
    return model


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("family", "recompute"), [("llama", "none"), ("llama", "full"), ("llama", "selective"), ("gpt2", "none"),
                              ("gpt_neox", "none"), ("mistral", "none"), ("qwen3", "selective"),
                              ("falcon", "selective"), ("falcon with ALiBi", "full"), ("pythia", "selective")],
)  # fmt: skip
def test_each_document_is_as_if_alone(family: str, recompute: Recompute, backend: native.Backend) -> None:
    """Logits, loss and gradients: packed, they are those of the documents one by one."""
    native.select(backend, "cpu")
    try:
        model, tokens, labels = model_of(family, recompute), random_ids(1), random_ids(2)
        packed = model(tokens, documents=documents_of(BEGINS))
        model(tokens, labels=labels, documents=documents_of(BEGINS)).backward()
        found = [parameter.grad for parameter in model.parameters()]
        model.zero_grad(set_to_none=True)
        for row, places in enumerate(BEGINS):
            for start, stop in pairwise([*places, LENGTH]):
                part = (slice(row, row + 1), slice(start, stop))
                torch.testing.assert_close(packed[start:stop, row], model(tokens[part])[:, 0], rtol=1e-11, atol=1e-11)
                model(tokens[part], labels=labels[part]).backward()
        for gradient, parameter in zip(found, model.parameters(), strict=True):
            assert gradient is not None and parameter.grad is not None and parameter.grad.abs().max() > 0
            assert (gradient - parameter.grad).abs().max() <= 1e-11 * parameter.grad.abs().max()
    finally:
        native.select("auto", "cpu")


@pytest.mark.parametrize("fields", [{}, {"num_key_value_heads": 1, "head_dim": 20}], ids=["grouped", "one kv head"])
def test_transformers_gives_the_same_under_a_mask(tmp_path: Path, fields: dict[str, Any]) -> None:
    """transformers with positions of each document and a mask [b, 1, s, s] that says which keys are of the query's."""
    reference = random_llama(3, **fields)
    reference.save_pretrained(tmp_path)
    reference = widened(reference)
    model, tokens, labels, documents = ours(tmp_path, torch.float64), random_ids(1), random_ids(2), documents_of(BEGINS)
    place = torch.arange(LENGTH)
    seen = (place >= documents.starts.unsqueeze(-1)) & (place <= place.unsqueeze(-1))
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    theirs = reference(tokens, attention_mask=mask.unsqueeze(1), position_ids=place - documents.starts).logits
    found = model(tokens, documents=documents).transpose(0, 1)[..., : model.config.vocab_size]
    assert (found - theirs).abs().max() <= 1e-10
    assert (our_logits(model, tokens) - theirs).abs().max() > 1e-2, "the documents make no difference"
    torch.nn.functional.cross_entropy(theirs.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    model(tokens, labels=labels, documents=documents).backward()
    gradients = canonical_gradients(model)
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        assert (gradients[name] - parameter.grad).abs().max() <= 1e-11 * parameter.grad.abs().max(), name
