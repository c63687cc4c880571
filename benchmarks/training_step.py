"""One training step here against `transformers` + `torch.optim.AdamW`, on the same small Llama, side by side.

Both run on this machine's CPU in one process, in turns, so that what else the machine does hits both alike. Prints one
line per precision: tokens per second of each, and the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from megatron.config.optimizer import OptimizerConfig
from megatron.data.loader import MicroBatch
from megatron.model.config import ModelConfig
from megatron.model.initialize import initialize
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank
from megatron.train.step import TrainingStep

MODEL = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
)
MICRO_BATCHES, MICRO_BATCH, SEQUENCE_LENGTH = 2, 4, 256
TOKENS = MICRO_BATCHES * MICRO_BATCH * SEQUENCE_LENGTH


def make_batches(seed: int) -> list[MicroBatch]:
    """Random micro-batches of one step."""
    generator = torch.Generator().manual_seed(seed)
    shape = (MICRO_BATCH, SEQUENCE_LENGTH + 1)
    samples = [torch.randint(MODEL.vocab_size, shape, generator=generator) for _ in range(MICRO_BATCHES)]
    return [MicroBatch(sample[:, :-1].contiguous(), sample[:, 1:].contiguous()) for sample in samples]


def our_step(dtype: torch.dtype) -> Callable[[list[MicroBatch], int], None]:
    """A function that trains this project's model by one step."""
    context = single_rank()
    model = Transformer(MODEL, context, dtype)
    initialize(model, MODEL, seed=1)
    step = TrainingStep(model, context, OptimizerConfig(), micro_batches=MICRO_BATCHES, zero=0, decay_steps=1000)
    step.optimizer.reset_masters()

    def run(batches: list[MicroBatch], number: int) -> None:
        step(batches, number)

    return run


def peer_step(dtype: torch.dtype) -> Callable[[list[MicroBatch], int], None]:
    """The same with transformers' model and torch's fused AdamW, all in `dtype` (so bf16 has no float32 masters)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**MODEL.to_huggingface())).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def run(batches: list[MicroBatch], number: int) -> None:
        for batch in batches:
            logits = model(input_ids=batch.tokens, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())
            (loss / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def measure(dtype: torch.dtype, steps: int) -> tuple[float, float]:
    """Median seconds of one step, (ours, peer's), after one step each that is not counted."""
    contestants = (our_step(dtype), peer_step(dtype))
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(steps + 1):
        batches = make_batches(number)
        for run, record in zip(contestants, seconds, strict=True):
            start = time.perf_counter()
            run(batches, number + 1)
            record.append(time.perf_counter() - start)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def main() -> None:
    """Measure float32 and bfloat16 and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7, help="counted steps of each (default 7)")
    arguments = parser.parse_args()
    print(f"training step, {MODEL.num_parameters:,} weights, {TOKENS:,} tokens, {torch.get_num_threads()} threads")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ours, peer = measure(dtype, arguments.steps)
        print(
            f"{name}: {TOKENS / ours:,.0f} tokens/s here, {TOKENS / peer:,.0f} with transformers + AdamW: "
            f"{peer / ours:.2f} times as fast"
        )


if __name__ == "__main__":
    main()
