"""One pipeline stage of the decoder: a run of layers, with the embedding on the first and the head on the last."""

from __future__ import annotations

import torch
from torch import nn

from megatron.config.train import Recompute
from megatron.kernels.rotary import rotary_tables
from megatron.model.block import Block
from megatron.model.config import ModelConfig
from megatron.model.norm import Norm
from megatron.model.vocabulary import Embedding, Head
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.pipeline.partition import layers_of_stage
from megatron.utils.errors import ConfigError

FINAL_NORM = "model.norm.weight"


class Transformer(nn.Module):
    """The part of a Llama model that this rank holds.

    Raises ConfigError where the model cannot be cut over the context's grid.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        check_divisible(config, context)
        device = torch.device(device)
        self.config, self.context = config, context
        self.is_first, self.is_last = context.pp.rank == 0, context.pp.rank == context.pp.size - 1
        shared = config.tie_word_embeddings and self.is_first and self.is_last
        if self.is_first:
            self.embedding = Embedding(config, context, dtype, device, uses=2 if shared else 1)
        layers = layers_of_stage(config.num_hidden_layers, context.pp.size, context.pp.rank)
        self.blocks = nn.ModuleList(Block(config, context, index, dtype, device, recompute) for index in layers)
        if self.is_last:
            self.final_norm = Norm(config, context, FINAL_NORM, dtype, device)
            self.head = Head(config, context, dtype, device, weight=self.embedding.weight if shared else None)
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(
        self, tokens: torch.Tensor, hidden: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """This stage's part of the forward pass.

        tokens [b, s]; hidden [s, b, h] ([s/tp, b, h] under sequence parallelism) from the stage before (None on
        the first); labels [b, s] (global ids, or IGNORED). Returns hidden for the next stage; on the last one the sum
        of the losses, a scalar, or without labels the logits [s, b, padded vocabulary/tp].
        """
        if self.is_first:
            hidden = self.embedding(tokens.t())
        assert hidden is not None, "a later stage needs the activations of the one before"
        cos, sin = self._rotary(tokens.shape[1], hidden)
        branch = None
        for block in self.blocks:
            hidden, branch = block(hidden, branch, cos, sin)
        if not self.is_last:
            return hidden if branch is None else hidden + branch
        _, normed = self.final_norm(hidden, branch)
        return self.head(normed) if labels is None else self.head.loss_sum(normed, labels)

    def _rotary(self, sequence_length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary tables for this length; made once, since all batches of a run are of one length."""
        if self._tables is None or self._tables[0].shape[0] != sequence_length:
            self._tables = rotary_tables(
                sequence_length, self.config.head_dim, self.config.rope_theta, like.dtype, like.device
            )
        return self._tables


def check_divisible(config: ModelConfig, context: ParallelContext) -> None:
    """Raise ConfigError, naming all rules that the model breaks on this grid."""
    tensor, pipeline = context.tp.size, context.pp.size
    problems = []
    for name in ("num_attention_heads", "intermediate_size"):
        size = getattr(config, name)
        if size % tensor:
            fits = ", ".join(str(n) for n in range(1, 129) if size % n == 0)
            problems.append(f"{name}={size} is not divisible by parallel.tensor={tensor}; use {fits}")
    if pipeline > config.num_hidden_layers:
        problems.append(
            f"num_hidden_layers={config.num_hidden_layers} leaves some of parallel.pipeline={pipeline} stages "
            f"without a layer; use at most {config.num_hidden_layers} stages"
        )
    if problems:
        raise ConfigError("The model does not fit the grid: " + "; ".join(problems) + ".")
