"""Simulated ranks and small checkpoints."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.native import step_folder
from megatron.checkpoint.store import save_checkpoint
from megatron.parallel.layout import Region

Tensors = Mapping[str, Mapping[str, torch.Tensor]]  # kind -> canonical name -> whole tensor

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def partition(region: Region, cuts: int, chance: random.Random) -> list[Region]:
    """The region as disjoint rectangles, by random straight cuts."""
    parts = [region]
    for _ in range(cuts):
        part = parts.pop(chance.randrange(len(parts)))
        dim = chance.randrange(len(part.size))
        if part.size[dim] < 2:
            parts.append(part)
            continue
        at = chance.randrange(1, part.size[dim])
        for begin, extent in ((0, at), (at, part.size[dim] - at)):
            start = tuple(low + begin * (d == dim) for d, low in enumerate(part.start))
            size = tuple(extent if d == dim else whole for d, whole in enumerate(part.size))
            parts.append(Region(part.name, part.shape, start, size))
    return parts


def run_ranks(count: int, work: Callable[[int, Callable[[str], list[str]]], Any]) -> list[Any]:
    """Run `work(rank, exchange)` in a thread per rank; returns each one's result or exception."""
    barrier = threading.Barrier(count, timeout=20)
    texts: list[str] = [""] * count
    results: list[Any] = [None] * count

    def rank_thread(rank: int) -> None:
        def exchange(text: str) -> list[str]:
            texts[rank] = text
            barrier.wait()
            gathered = list(texts)
            barrier.wait()
            return gathered

        try:
            results[rank] = work(rank, exchange)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=rank_thread, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def save(
    root: Path,
    tensors: Tensors,
    *,
    step: int = 1,
    ranks: int = 1,
    cuts: int = 0,
    chance: random.Random | None = None,
    config: Mapping[str, Any] = CONFIG,
    carried: Mapping[str, bytes] | None = None,
    state: Mapping[str, Any] | None = None,
    run_config: str = "train:\n  steps: 5\n",
) -> list[Any]:
    """Save whole tensors as random rectangles dealt to simulated ranks; returns each rank's result or exception."""
    chance = chance or random.Random(0)
    shares: list[dict[str, list[tuple[Region, torch.Tensor]]]] = [{kind: [] for kind in tensors} for _ in range(ranks)]
    for kind, named in tensors.items():
        for name, tensor in named.items():
            for region in partition(Region.whole(name, tuple(tensor.shape)), cuts, chance):
                shares[chance.randrange(ranks)][kind].append((region, tensor[region.slices]))

    def work(rank: int, exchange: Callable[[str], list[str]]) -> None:
        save_checkpoint(
            root / step_folder(step),
            rank=rank,
            exchange=exchange,
            tensors=shares[rank],
            state={"step": step, **(state or {})},
            model_config=config,
            run_config_yaml=run_config,
            carried=carried or {},
        )

    return run_ranks(ranks, work)


def random_tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Weights in bf16 and optimizer state in fp32, of an invented model."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (12, 8), "model.norm.weight": (8,), "lm_head.weight": (11, 9)}
    dtypes = {"weights": torch.bfloat16, "master": torch.float32, "exp_avg": torch.float32}
    return {
        kind: {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for kind, dtype in dtypes.items()
    }


@pytest.fixture
def tensors() -> dict[str, dict[str, torch.Tensor]]:
    return random_tensors()


@pytest.fixture
def saved(tmp_path: Path, tensors) -> Path:
    """A save folder with whole checkpoints of steps 1, 2 and 3, three ranks each."""
    root = tmp_path / "save"
    for step in (1, 2, 3):
        assert save(root, tensors, step=step, ranks=3, cuts=2) == [None] * 3
    return root
