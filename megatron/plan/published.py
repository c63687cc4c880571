"""Published training runs, to which the hardware figures are fitted: what was measured, and what plans them.

SC'21: Narayanan et al., arXiv 2104.04473, Table 1, with micro-batches and layers per chunk from the run scripts. H100:
the table of Megatron-LM's README (core 0.8), which states neither micro-batch nor chunks: as many chunks as divide the
layers of a stage, up to 24, and micro-batches of 1 (2 without a pipeline, where each data rank has 4 samples).
Meditron: arXiv 2311.16079, section 4.1, whose nodes have one adapter of unstated rate: 100 Gb/s is assumed.
Llama-2-13B: torchtitan's docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron.config.load import config_from_dict
from megatron.config.run import RunConfig
from megatron.model.config import ModelConfig


@dataclass(frozen=True)
class Row:
    """One published run: `step_s` seconds for a step, on `gpus` of `gpu`."""

    name: str
    step_s: float
    gpus: int
    gpu: str
    interconnect: str
    model: ModelConfig
    parallel: dict[str, Any]
    train: dict[str, Any]
    sequence_length: int
    kernels: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        return config_from_dict(
            {
                "data": {"train": "synthetic", "sequence_length": self.sequence_length},
                "parallel": self.parallel,
                "train": self.train,
                "kernels": self.kernels,
            },
            self.name,
        )


def gpt(hidden: int, heads: int, layers: int, vocabulary: int, length: int, rotary: bool) -> ModelConfig:
    """The plain GPT of these sizes: GPT-2's learned positions and tied output, or GPT-NeoX's rotary and own output."""
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=length,
        rms_norm_eps=None,
        layer_norm_eps=1e-5,
        rope_theta=10000.0 if rotary else None,
        tie_word_embeddings=not rotary,
        model_type="gpt_neox" if rotary else "gpt2",
        hidden_act="gelu" if rotary else "gelu_new",
        query_key_value_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    )


def _chunked(pipeline: int, chunks: int) -> dict[str, Any]:
    if chunks == 1:
        return {"pipeline": pipeline}
    return {"pipeline": pipeline, "chunks": chunks, "schedule": "interleaved"}


# N (billions), heads, hidden, layers, t, p, n, B, b, layers of a chunk (0: no chunks), TFLOP/s a GPU
_SC21 = [
    (1.7, 24, 2304, 24, 1, 1, 32, 512, 16, 0, 137),
    (3.6, 32, 3072, 30, 2, 1, 64, 512, 16, 0, 138),
    (7.5, 32, 4096, 36, 4, 1, 128, 512, 16, 0, 142),
    (18.4, 48, 6144, 40, 8, 1, 256, 1024, 8, 0, 135),
    (39.1, 64, 8192, 48, 8, 2, 512, 1536, 4, 0, 138),
    (76.1, 80, 10240, 60, 8, 4, 1024, 1792, 2, 5, 140),
    (145.6, 96, 12288, 80, 8, 8, 1536, 2304, 2, 5, 148),
    (310.1, 128, 16384, 96, 8, 16, 1920, 2160, 1, 3, 155),
    (529.6, 128, 20480, 105, 8, 35, 2520, 2520, 1, 1, 163),
    (1008.0, 160, 25600, 128, 8, 64, 3072, 3072, 1, 0, 163),
]

# N, heads, hidden, layers, t, p, n, B, TFLOP/s a GPU
_H100 = [
    (1.7, 16, 2048, 24, 1, 1, 48, 192, 408.8),
    (7.1, 32, 4096, 30, 2, 1, 96, 192, 465.9),
    (16, 48, 6144, 32, 4, 1, 192, 192, 489.1),
    (32, 56, 7168, 48, 8, 1, 384, 192, 459.6),
    (70, 64, 8192, 84, 8, 2, 768, 384, 419.7),
    (119, 80, 10240, 92, 8, 4, 1536, 768, 420.5),
    (177, 96, 12288, 96, 8, 6, 2304, 1152, 432.8),
    (314, 128, 16384, 96, 8, 8, 3072, 1536, 474.4),
    (462, 144, 18432, 112, 8, 16, 6144, 3072, 459.9),
]


def sc21() -> list[Row]:
    """Table 1: full recomputation, attention not fused, no sequence parallelism, no optimizer sharding."""
    rows = []
    for billions, heads, hidden, layers, t, p, n, batch, micro, in_chunk, tflops in _SC21:
        flops = 96.0 * batch * 2048 * layers * hidden**2 * (1 + 2048 / (6 * hidden) + 51200 / (16 * layers * hidden))
        chunks = layers // (p * in_chunk) if in_chunk else 1
        rows.append(
            Row(
                f"SC'21 {billions}B",
                flops / (n * tflops * 1e12),
                n,
                "a100-80gb",
                "dgx-a100",
                gpt(hidden, heads, layers, 51200, 2048, rotary=False),
                {"tensor": t, "sequence": False, "zero": 0, **_chunked(p, chunks)},
                {"global_batch": batch, "micro_batch": micro, "recompute": "full"},
                2048,
                {"attention": "eager"},
            )
        )
    return rows


def h100() -> list[Row]:
    """Sequence parallel, optimizer sharded, nothing recomputed."""
    rows = []
    for billions, heads, hidden, layers, t, p, n, batch, tflops in _H100:
        model = gpt(hidden, heads, layers, 131072, 4096, rotary=True)
        flops = 72.0 * batch * 4096 * layers * hidden**2 * (1 + 4096 / (6 * hidden) + 131072 / (12 * layers * hidden))
        chunks = max(count for count in range(1, 25) if (layers // p) % count == 0) if p > 1 else 1
        rows.append(
            Row(
                f"H100 {billions}B",
                flops / (n * tflops * 1e12),
                n,
                "h100-80gb",
                "dgx-h100",
                model,
                {"tensor": t, **_chunked(p, chunks)},
                {"global_batch": batch, "micro_batch": 1 if p > 1 else 2},
                4096,
            )
        )
    return rows


def llama() -> list[Row]:
    """Meditron-70B by Megatron-LLM, and Llama-2-13B by torchtitan's full sharding."""
    llama2_70b = ModelConfig(32017, 8192, 28672, 80, 64, 8, 128, 4096)
    llama2_13b = ModelConfig(32000, 5120, 13824, 40, 40, 40, 128, 4096)
    meditron = Row(
        "Meditron-70B",
        512 * 4096 / 40_200,
        128,
        "a100-80gb",
        "a100-1x100g",
        llama2_70b,
        {"tensor": 8, "pipeline": 8, "zero": 0},
        {"global_batch": 512, "micro_batch": 2, "recompute": "selective"},
        4096,
    )
    thirteen = Row(
        "Llama-2-13B",
        128 * 4096 / (64 * 2162),
        64,
        "a100-80gb",
        "a100-4x200g",
        llama2_13b,
        {"zero": 3},
        {"global_batch": 128, "micro_batch": 2},
        4096,
    )
    return [meditron, thirteen]


def published() -> list[Row]:
    """All of them."""
    return [*sc21(), *llama(), *h100()]
