"""The optimizer state of Megatron-LLM's checkpoints, made here by its rules from weights, plain and distributed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.checkpoint.source import Source, open_source
from megatron.parallel.layout import Region
from megatron.utils.errors import CheckpointError

from .test_convert import random_weights
from .test_megatron_llm import LLAMA, enums, write_megatron

__all__ = ["enums"]
pytestmark = pytest.mark.usefixtures("enums")

KINDS = {"master": 1.0, "exp_avg": 2.0, "exp_avg_sq": 3.0}  # as multiples of the weights
MODULES = ["input_layernorm", "query_key_value", "dense.", "post_attention", "h_to_4h", "4h_to_h"]


def module_order(chunk: dict) -> list[torch.Tensor]:
    """The parameters of a model chunk in float32, in the order of its modules."""
    language = chunk["language_model"]
    found = [language["lm_head"]] if "lm_head" in language else []
    if "embedding" in language:
        found.append(language["embedding"]["word_embeddings"]["weight"])
    encoder = dict(language["encoder"])
    final = [encoder.pop(name) for name in list(encoder) if name.startswith("final")]
    layers = sorted({int(name.split(".")[1]) for name in encoder})
    for layer in layers:
        names = [name for name in encoder if name.startswith(f"layers.{layer}.")]
        found += [
            encoder[name] for module in MODULES for name in names if f".{module}" in name or f"dense_{module}" in name
        ]
    assert len(found) + len(final) == len(encoder) + len(final) + ("lm_head" in language) + ("embedding" in language)
    return [tensor.float() for tensor in found + final]


def groups_of(tensors: list[torch.Tensor], like: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """With weight decay, then without."""
    pairs = list(zip(tensors, like, strict=True))
    split = [[tensor for tensor, whole in pairs if (whole.dim() > 1) is decays] for decays in (True, False)]
    return [group for group in split if group]


def inner(groups: list[list[torch.Tensor]]) -> dict:
    flat = [tensor for group in groups for tensor in group]
    state = {n: {kind: KINDS[kind] * tensor for kind in ("exp_avg", "exp_avg_sq")} for n, tensor in enumerate(flat)}
    return {"state": state, "param_groups": [{"step": 90, "wd_mult": 1.0, "params": [0]}]}


def add_plain(folder: Path) -> None:
    for path in folder.rglob("model_optim_rng.pt"):
        content = torch.load(path, weights_only=False)
        chunks = [value for key, value in content.items() if key.startswith("model")]
        parameters = [tensor for chunk in chunks for tensor in module_order(chunk)]
        groups = groups_of(parameters, parameters)
        content["optimizer"] = {"optimizer": inner(groups), "fp32_from_fp16_params": groups}
        torch.save(content, path)


def add_distributed(folder: Path, size: int) -> None:
    for path in list(folder.rglob("model_optim_rng.pt")):
        content = torch.load(path, weights_only=False)
        chunks = [module_order(value) for key, value in content.items() if key.startswith("model")]
        for rank in range(size):
            shards, like = [], []
            for parameters in chunks:
                share = -(-sum(tensor.numel() for tensor in parameters) // size)
                mine, at = [], 0
                for tensor in reversed(parameters):
                    low, high = max(at, rank * share), min(at + tensor.numel(), (rank + 1) * share)
                    if low < high:
                        mine.append((tensor.flatten()[low - at : high - at].clone(), tensor))
                    at += tensor.numel()
                shards += [shard for shard, _ in reversed(mine)]
                like += [tensor for _, tensor in reversed(mine)]
            groups = groups_of(shards, like)
            place = path.parent.with_name(f"{path.parent.name}_{rank:03d}")
            place.mkdir()
            state = {"optimizer": inner(groups), "shard_fp32_from_float16_groups": groups}
            torch.save({"optimizer": state}, place / "optim.pt")
        path.rename(path.with_name("model_rng.pt"))


def check(source: Source, weights: dict[str, torch.Tensor]) -> None:
    for kind, factor in KINDS.items():
        assert source.shapes(kind) == {name: tuple(tensor.shape) for name, tensor in weights.items()}
        for name, tensor in weights.items():
            out = torch.empty(tensor.shape)
            source.read(Region.whole(name, tuple(tensor.shape)), out, kind)
            assert torch.equal(out, factor * tensor.float()), (kind, name)


@pytest.mark.parametrize("size", [0, 1, 3, 8], ids=lambda size: f"{size} data ranks" if size else "plain")
@pytest.mark.parametrize(
    "grid", [{}, {"tensor": 2}, {"tensor": 2, "pipeline": 2}, {"tensor": 2, "pipeline": 2, "virtual": 2}], ids=str
)
def test_masters_moments_and_progress(tmp_path: Path, grid: dict, size: int) -> None:
    weights = random_weights(LLAMA)
    folder = write_megatron(tmp_path / "mega", weights, **grid, true_vocab_size=40)
    if size:
        add_distributed(folder, size)
    else:
        add_plain(folder)
    with open_source(folder) as source:
        assert source.has_optimizer and source.step == 100
        expected = {"step": 100, "consumed_samples": 7, "consumed_tokens": 7 * 64, "updates": 100 if size else 90}
        assert source.state == expected
        check(source, weights)


def test_a_state_of_another_model_is_noticed(tmp_path: Path) -> None:
    folder = write_megatron(tmp_path / "mega", random_weights(LLAMA), true_vocab_size=40)
    add_plain(folder)
    path = next(folder.rglob("model_optim_rng.pt"))
    content = torch.load(path, weights_only=False)
    content["optimizer"]["optimizer"]["state"][3]["exp_avg"] = torch.ones(3, 3)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="another optimizer state than its model has"):
        open_source(folder)


def test_a_missing_data_rank_is_noticed(tmp_path: Path) -> None:
    folder = write_megatron(tmp_path / "mega", random_weights(LLAMA), tensor=2, true_vocab_size=40)
    add_distributed(folder, 3)
    next(folder.rglob("mp_rank_00_001/optim.pt")).unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete: of mp_rank_00_… it holds \[0, 2\]"):
        open_source(folder)
