"""One pipeline stage of the decoder: a run of layers, with the embedding on the first and the head on the last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from megatron.config.train import Recompute
from megatron.kernels.runs import Documents
from megatron.model.alibi import head_slopes
from megatron.model.angles import depends_on_length, position_tables
from megatron.model.block import Block
from megatron.model.config import ModelConfig
from megatron.model.norm import make_norm
from megatron.model.places import find_places
from megatron.model.vocabulary import Head, Measure, make_embedding
from megatron.parallel.buckets import Unit
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.pipeline.partition import Part, cut, parts_of_stage
from megatron.utils.errors import ConfigError


class Transformer(nn.Module):
    """A part of a model: all that this rank holds, or one chunk of it.

    Without a `part` the layers are dealt out evenly to the pipeline's stages. `recompute` holds for the first
    `recompute_layers` of its layers (None: for all). Raises ConfigError where the model cannot
    be cut over the context's grid.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        recompute: Recompute = "none",
        part: Part | None = None,
        recompute_layers: int | None = None,
    ) -> None:
        super().__init__()
        check_divisible(config, context)
        device = torch.device(device)
        part = part or cut(config.num_hidden_layers, context.pp.size)[context.pp.rank]
        self.config, self.context = config, context
        self.is_first, self.is_last = part.first, part.last
        shared = config.tie_word_embeddings and self.is_first and self.is_last
        if self.is_first:
            self.embedding = make_embedding(config, context, dtype, device, uses=2 if shared else 1)
        some = len(part.layers) if recompute_layers is None else recompute_layers
        kinds = [recompute if at < some else "none" for at in range(len(part.layers))]
        self.blocks = nn.ModuleList(
            Block(config, context, index, dtype, device, kind) for index, kind in zip(part.layers, kinds, strict=True)
        )
        if self.is_last:
            self.final_norm = make_norm(config, context, config.family.final_norm, dtype, device)
            self.head = Head(config, context, dtype, device, weight=self.embedding.weight if shared else None)
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def chunks(self) -> list[Transformer]:
        """This part alone, as a stage of one chunk."""
        return [self]

    @property
    def units(self) -> list[Unit]:
        """What a forward pass calls one after the other."""
        units = [Unit((block,)) for block in self.blocks]
        if self.is_first:  # nothing lies below it whose gradient its weights would give
            units.insert(0, Unit((self.embedding,), backward_reads=False))
        if self.is_last:
            units.append(Unit((self.final_norm, self.head), backward_follows=True))
        return units

    def forward(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        documents: Documents | None = None,
        loss_weights: torch.Tensor | None = None,
        measure: Measure | None = None,
    ) -> torch.Tensor:
        """This stage's part of the forward pass.

        tokens [b, s]; hidden [s, b, h] ([s/tp, b, h] under sequence parallelism) from the stage before (None on
        the first); labels [b, s] (global ids, or IGNORED) and, where they do not all count alike, their `loss_weights`
        [b, s]; the `documents` within which attention and positions stay; `measure` as for the `Head`. All are of this
        rank's part of the sequences. Returns hidden for the next stage; on the last one the sum of the losses, a
        scalar, or without labels the logits [s, b, padded vocabulary/tp].
        """
        cp = self.context.cp
        batch, length = tokens.shape
        tables = self._rotary(length * cp.size, documents)
        window = self._window(length * cp.size)
        places = find_places(batch, length, documents, tables, cp, window, self._slopes())
        if self.is_first:
            hidden = self.embedding(tokens.t(), places.positions.t())
        assert hidden is not None, "a later stage needs the activations of the one before"
        branch = None
        for block in self.blocks:
            hidden, branch = block(hidden, branch, places)
        if not self.is_last:
            return hidden if branch is None else hidden + branch
        _, normed = self.final_norm(hidden, branch)
        return self.head(normed, labels, loss_weights, measure)

    def _window(self, sequence_length: int) -> int | None:
        """The window of the layers that have one, None where it holds all of a sequence."""
        window, context = self.config.sliding_window, self.context
        if window is None or window >= sequence_length:
            return None
        if context.cp.size > 1 and context.context_attention == "ring":
            raise ConfigError(
                f"sequences of {sequence_length} tokens do not fit the model's sliding_window={window}, which "
                "parallel.context_attention=ring cannot cut; use all_gather, or shorter sequences"
            )
        return window

    def _slopes(self) -> torch.Tensor | None:
        """ALiBi's slopes of this rank's heads, where the model has them."""
        if not self.config.alibi:
            return None
        slopes = head_slopes(self.config.num_attention_heads, next(self.parameters()).device)
        return slopes.chunk(self.context.tp.size)[self.context.tp.rank]

    def _rotary(self, sequence_length: int, documents: Documents | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary tables for this length: the beginning of those for the longest so far, where it is the same."""
        own = depends_on_length(self.config, sequence_length)
        if own and documents is not None:
            raise ConfigError(
                f"rope_scaling of type dynamic has other angles for each length above max_position_embeddings="
                f"{self.config.max_position_embeddings}, and the documents in a sample of {sequence_length} tokens "
                f"have lengths of their own; use samples of at most {self.config.max_position_embeddings} tokens"
            )
        longest = 0 if self._tables is None else self._tables[0].shape[0]
        shared = longest > sequence_length and not depends_on_length(self.config, longest)
        if self._tables is None or not (longest == sequence_length or shared):
            like = next(self.parameters())
            self._tables = position_tables(self.config, sequence_length, like.dtype, like.device)
        cos, sin = self._tables
        return cos[:sequence_length], sin[:sequence_length]


class ChunkedTransformer(nn.Module):
    """The parts of a model that one stage of an interleaved pipeline holds, in the order of the layers."""

    def __init__(self, chunks: Sequence[Transformer]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(chunks)
        self._chunks = list(chunks)
        self.config, self.context = chunks[0].config, chunks[0].context

    @property
    def chunks(self) -> list[Transformer]:
        """The parts, in order."""
        return self._chunks


def build_stage(
    config: ModelConfig,
    context: ParallelContext,
    parts: Sequence[Part],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    recompute: Recompute = "none",
    recompute_layers: int | None = None,
) -> Transformer | ChunkedTransformer:
    """What this rank holds of a model that is cut into `parts`, those of all stages.

    `recompute` holds for the first `recompute_layers` layers of the stage (None: for all).
    """
    mine = parts_of_stage(parts, context.pp.size, context.pp.rank)
    chunks, left = [], recompute_layers
    for part in mine:
        chunks.append(Transformer(config, context, dtype, device, recompute, part, left))
        left = None if left is None else max(0, left - len(part.layers))
    return chunks[0] if len(chunks) == 1 else ChunkedTransformer(chunks)


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
