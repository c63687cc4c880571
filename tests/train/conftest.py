"""A world of one process, a tiny model, and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.data.loader import MicroBatch
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Axis
from megatron.parallel.world import World
from megatron.utils.environment import Launch

MODEL = ModelConfig(64, 24, 40, 2, 4, 2, 6, max_position_embeddings=32)


@pytest.fixture
def world() -> World:
    return World(Launch(), torch.device("cpu"), Axis("control"))


def random_batch(count: int, *, micro_batch: int = 2, length: int = 12, seed: int = 0) -> list[MicroBatch]:
    """`count` micro-batches of random tokens, all predicted."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randint(0, MODEL.vocab_size, (count, micro_batch, length + 1), generator=generator)
    return [MicroBatch(sample[:, :-1], sample[:, 1:].clone()) for sample in samples]


@pytest.fixture
def huggingface_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with random weights of a model, in Hugging Face's format."""

    def make(name: str = "hf", model: ModelConfig = MODEL) -> Path:
        from transformers import LlamaConfig, LlamaForCausalLM

        LlamaForCausalLM(LlamaConfig(**model.to_huggingface())).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make
