"""The two layers over the vocabulary: the embedding of the first stage and the output product of the last."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megatron.model.config import ModelConfig
from megatron.model.loss import Predictions, head_loss, head_predictions
from megatron.parallel.layers import (
    ShardedParameter,
    column_linear,
    copied_spec,
    position_embedding,
    vocabulary_embedding,
)
from megatron.parallel.layout import Piece, Region, ShardSpec
from megatron.parallel.mesh import ParallelContext
from megatron.utils.errors import ConfigError

Measure = Callable[[Predictions], None]


class Embedding(nn.Module):
    """Rows of this rank's share of the vocabulary. `uses` is 2 where the output product shares the weight."""

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext,
        dtype: torch.dtype,
        device: torch.device,
        uses: int = 1,
    ) -> None:
        super().__init__()
        self.context = context
        spec = vocabulary_spec(config, context, config.family.embedding)
        self.weight = ShardedParameter.empty(spec, dtype, device, uses)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """tokens [s, b], at positions [s, b] or [s, 1] → [s, b, h], or [s/tp, b, h] under sequence parallelism."""
        return vocabulary_embedding(tokens, self.weight, self.context)


class EmbeddingWithPositions(Embedding):
    """Tokens' rows plus those of a learned table of positions, a copy of which every tensor rank holds.

    Under sequence parallelism positions are added behind the scatter, by each rank those of its share: so a rank's
    gradient of the table is a part, as that of a norm's weight is.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext,
        dtype: torch.dtype,
        device: torch.device,
        uses: int = 1,
    ) -> None:
        super().__init__(config, context, dtype, device, uses)
        shape = (config.max_position_embeddings, config.hidden_size)
        self.positions = ShardedParameter.empty(
            copied_spec(context, f"{config.family.positions}.weight", shape), dtype, device
        )

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As for tokens alone. Raises ConfigError where the table may lack a row for a position."""
        longest, length = self.positions.shape[0], tokens.shape[0] * self.context.cp.size
        if length > longest:
            raise ConfigError(
                f"a sequence of {length} tokens is above the model's max_position_embeddings={longest}: its "
                f"positions are learned, and there are no more of them; use {longest} or fewer"
            )
        hidden = super().forward(tokens, positions)
        return position_embedding(hidden, self._share(positions), self.positions)

    def _share(self, positions: torch.Tensor) -> torch.Tensor:
        """The positions of the tokens whose hidden state this rank has."""
        return positions.chunk(self.context.tp.size)[self.context.tp.rank] if self.context.sequence else positions


def make_embedding(
    config: ModelConfig, context: ParallelContext, dtype: torch.dtype, device: torch.device, uses: int = 1
) -> Embedding:
    """The embedding of the model's family."""
    kind = Embedding if config.family.positions is None else EmbeddingWithPositions
    return kind(config, context, dtype, device, uses)


class Head(nn.Module):
    """The output product over this rank's share of the vocabulary; `weight` is the embedding's where they are tied."""

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext,
        dtype: torch.dtype,
        device: torch.device,
        weight: ShardedParameter | None = None,
    ) -> None:
        super().__init__()
        self.context, self.vocab_size = context, config.vocab_size
        if weight is None:
            name = config.family.embedding if config.tie_word_embeddings else config.family.head
            weight = ShardedParameter.empty(vocabulary_spec(config, context, name), dtype, device)
        self.weight = weight

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        measure: Measure | None = None,
    ) -> torch.Tensor:
        """hidden [s, b, h] ([s/tp, b, h] under sequence parallelism) → logits [s, b, padded vocabulary/tp]; with labels
        [b, s] the sum of the losses, a scalar, for which the logits never exist all at once; each times its weight,
        where `loss_weights` [b, s] are given. `measure` is told of each prediction; it is for evaluation, without
        gradients."""
        if labels is None:
            return column_linear(hidden, self.weight, self.context)
        weights = None if loss_weights is None else loss_weights.t()
        if measure is None:
            return head_loss(hidden, self.weight, labels.t(), self.vocab_size, self.context, weights)
        predictions = head_predictions(hidden, self.weight, labels.t(), self.vocab_size, self.context)
        measure(predictions)
        return (predictions.losses if weights is None else predictions.losses * weights).sum()


def vocabulary_spec(config: ModelConfig, context: ParallelContext, name: str) -> ShardSpec:
    """This rank's rows of the embedding or head `name` (as `lm_head`), padding rows last.

    A tied embedding on two stages is a copy over `embed`; its gradients there come from different uses, so are parts.
    """
    share = config.padded_vocab_size(context.tp.size) // context.tp.size
    first = context.tp.rank * share
    rows = min(max(config.vocab_size - first, 0), share)
    shape = (share, config.hidden_size)
    if rows == 0:
        return ShardSpec(shape, ())
    region = Region(f"{name}.weight", (config.vocab_size, config.hidden_size), (first, 0), (rows, config.hidden_size))
    if config.tie_word_embeddings and context.embed.size > 1:
        piece = Piece(region, (0, 0), copy_axis="embed", copy_rank=context.embed.rank, partial=True)
    else:
        piece = Piece(region, (0, 0))
    return ShardSpec(shape, (piece,))
