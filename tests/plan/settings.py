"""Small runs to plan, and the same runs for real."""

from __future__ import annotations

from typing import Any

from megatron.config.load import config_from_dict
from megatron.config.run import RunConfig
from megatron.model.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=500,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=64,
)


def config(
    *,
    steps: int = 10,
    global_batch: int = 4,
    micro_batch: int = 1,
    precision: str = "fp32",
    recompute: str = "none",
    **parallel: Any,
) -> RunConfig:
    """A configuration that plans and runs."""
    return config_from_dict(
        {
            "data": {"train": "synthetic"},
            "parallel": parallel,
            "train": {
                "steps": steps,
                "global_batch": global_batch,
                "micro_batch": micro_batch,
                "precision": precision,
                "recompute": recompute,
            },
        },
        "test",
    )
