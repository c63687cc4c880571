"""The same training by transformers and torch.optim.AdamW, in float32, from an independent reading of the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import AutoConfig, LlamaForCausalLM

from megatron.data.indexed import IndexedReader


@dataclass(frozen=True)
class Recipe:
    """A run of `steps` steps: linear warm-up from 0, cosine to the floor, AdamW, clipping."""

    steps: int = 20
    global_batch: int = 8
    sequence_length: int = 64
    learning_rate: float = 2e-3
    min_learning_rate: float = 2e-4
    warmup_steps: int = 3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    seed: int = 17

    def settings(self, model: Path, data: Path) -> dict[str, Any]:
        """Our configuration of the same run."""
        optimizer = ("learning_rate", "min_learning_rate", "warmup_steps", "beta1", "beta2", "eps", "weight_decay")
        return {
            "model.init_from": model,
            "data.train": data,
            "data.sequence_length": self.sequence_length,
            "data.seed": self.seed,
            **{f"optimizer.{name}": getattr(self, name) for name in (*optimizer, "clip_grad")},
            "train.steps": self.steps,
            "train.global_batch": self.global_batch,
            "train.precision": "fp32",
            "log.interval": 1,
        }

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        finished = step - 1
        if finished < self.warmup_steps:
            return self.learning_rate * finished / self.warmup_steps
        share = (finished - self.warmup_steps) / (self.steps - self.warmup_steps)
        amplitude = (self.learning_rate - self.min_learning_rate) / 2
        return self.min_learning_rate + amplitude * (1 + math.cos(math.pi * share))


def megatron_samples(data: Path, recipe: Recipe) -> NDArray[np.int64]:
    """[samples, s + 1] in the order of Megatron's GPT dataset, for a run within one epoch: whole documents are
    shuffled and joined, cut into windows that share a token, and the windows shuffled."""
    reader = IndexedReader(data)
    documents = [reader.read(number).astype(np.int64) for number in range(len(reader))]
    samples, length = recipe.steps * recipe.global_batch, recipe.sequence_length
    generator = np.random.RandomState(recipe.seed)
    order = np.arange(len(documents))
    generator.shuffle(order)
    stream = np.concatenate([documents[number] for number in order])
    windows = np.arange((len(stream) - 1) // length)
    assert len(windows) >= samples, "one epoch must be enough"
    generator.shuffle(windows)
    return np.stack([stream[window * length : window * length + length + 1] for window in windows[:samples]])


def train_with_torch(
    model_folder: Path, samples: NDArray[np.int64], recipe: Recipe, *, decay_norms: bool = False, **changes: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(losses, gradient norms before clipping) of each step. `changes` are made to the model's configuration."""
    config = AutoConfig.from_pretrained(model_folder)
    for name, value in changes.items():
        setattr(config, name, value)
    model = LlamaForCausalLM.from_pretrained(model_folder, config=config, dtype=torch.float32)
    parameters = list(model.parameters())
    decayed = [parameter for parameter in parameters if decay_norms or parameter.dim() > 1]
    others = [parameter for parameter in parameters if not decay_norms and parameter.dim() == 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
    )
    losses, norms = [], []
    for step, batch in enumerate(np.split(samples, recipe.steps), start=1):
        tokens = torch.from_numpy(batch)
        logits = model(tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return np.array(losses), np.array(norms)
