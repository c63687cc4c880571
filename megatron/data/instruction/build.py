"""From the `data` section to datasets of conversations (`data.kind: instruction`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.config.data import Blend, DataConfig, blends_of
from megatron.data.blend import MegatronChoices, StableChoices, normalised
from megatron.data.build import (
    PART_NAMES,
    PART_PLACES,
    TRAINING,
    VALIDATION,
    shares_of,
    source_names,
    validation_blend,
)
from megatron.data.dataset import ENDLESS
from megatron.data.instruction.dataset import Batching, InstructionDataset
from megatron.data.instruction.order import Epochs, InOrder, MegatronEpochs, Order, StableEpochs, megatron_part
from megatron.data.instruction.pair import ConversationPair
from megatron.data.split import split_bounds
from megatron.utils.errors import DataError
from megatron.utils.logging import get_logger

_LOGGER = get_logger(__name__)


@dataclass(frozen=True)
class InstructionSources:
    """The pairs of `data.train`, each with its weight in the blend."""

    pairs: tuple[ConversationPair, ...]
    weights: tuple[float, ...]

    def describe(self) -> list[dict[str, Any]]:
        """What the order of the samples depends on. Pairs are known by their sizes, so that data may move."""
        return [
            {"weight": weight, "sequences": len(pair), "tokens": pair.num_tokens}
            for weight, pair in zip(self.weights, self.pairs, strict=True)
        ]


def open_instruction_sources(config: DataConfig) -> InstructionSources:
    """The pairs of `data.train`, which is one blend. Raises DataError for what is missing or damaged."""
    assert config.train is not None
    (stage,) = blends_of(config.train)
    blend = stage.blend
    pairs = tuple(ConversationPair(prefix) for _, prefix in blend)
    by_size = [max(1, pair.num_tokens) ** (1 / config.temperature) for pair in pairs]
    weights = (size if weight is None else weight for (weight, _), size in zip(blend, by_size, strict=True))
    return InstructionSources(pairs, tuple(weights))


def build_instruction_training(
    config: DataConfig, *, sequence_length: int, vocab_size: int, length_unit: int
) -> InstructionDataset:
    """The training rows of `data.train` in `data.order`, without end: `megatron` is Megatron-LLM's sampling.

    The grid needs rows whose length is a multiple of `length_unit`.
    """
    sources = open_instruction_sources(config)
    members = [_epochs(config, pair) for pair in sources.pairs]
    choices = None
    if len(members) > 1:
        weights = normalised(sources.weights)
        choices = StableChoices(weights) if config.order == "stable" else MegatronChoices(weights)
    for pair in sources.pairs:
        _tell_what_is_cut_off(pair, sequence_length)
    return InstructionDataset(
        sources.pairs,
        Order(members, choices),
        _batching(config, sequence_length, length_unit),
        vocab_size=vocab_size,
        seed=config.seed,
    )


def build_instruction_validation(
    config: DataConfig,
    *,
    sequence_length: int,
    samples: int | None,
    vocab_size: int,
    length_unit: int,
    part: int = VALIDATION,
) -> list[tuple[str, InstructionDataset]]:
    """A fixed set for each validation source, with a name of it: its first rows. Empty if there are none.

    The sources are those of `data.validation` in file order, or a part of data.split (the second) of those of
    `data.train` in the order in which Megatron-LLM divides them. They share `samples` rows by weight, at least one
    each; where it is None, they give all they have.
    """
    blend: Blend = validation_blend(config)
    if not blend:
        return []
    shares = shares_of(blend, samples)
    prefixes = [prefix for _, prefix in blend]
    found = []
    for name, prefix, share in zip(source_names(prefixes), prefixes, shares, strict=True):
        pair = ConversationPair(prefix)
        held = _part(config, pair, part)[0] if config.validation is None else np.arange(len(pair))
        if len(held):
            batching = _batching(config, sequence_length, length_unit)
            order, most = Order([InOrder(held)]), ENDLESS if share is None else share
            found.append((name, InstructionDataset([pair], order, batching, vocab_size=vocab_size, most=most)))
    if not found:
        raise DataError(
            f"data.split={config.split} leaves no conversation of data.train for {PART_NAMES[part]}; give its "
            f"{PART_PLACES[part]} part more, or name a prefix in data.{PART_NAMES[part]}"
        )
    return found


def _epochs(config: DataConfig, pair: ConversationPair) -> Epochs:
    part, generator = _part(config, pair, TRAINING)
    if not len(part):
        raise DataError(
            f"data.split={config.split} leaves none of the {len(pair)} conversations of {pair.prefix} for training; "
            "give the first part more, or leave data.split out"
        )
    return StableEpochs(part, config.seed) if config.order == "stable" else MegatronEpochs(part, generator)


def _part(config: DataConfig, pair: ConversationPair, part: int) -> tuple[NDArray[np.int64], np.random.RandomState]:
    if config.split is None:
        return megatron_part(len(pair), None, config.seed)
    bounds = split_bounds(config.split, len(pair), config.split_rounding)
    return megatron_part(len(pair), (bounds[part], bounds[part + 1]), config.seed)


def _batching(config: DataConfig, sequence_length: int, length_unit: int) -> Batching:
    return Batching(sequence_length, config.packing, config.prompt_loss_weight, config.pad_token_id, length_unit)


def _tell_what_is_cut_off(pair: ConversationPair, sequence_length: int) -> None:
    over = pair.sizes[pair.sizes > sequence_length + 1].astype(np.int64)
    if len(over):
        _LOGGER.warning(
            "%s of the %s conversations of %s are longer than data.sequence_length=%d + 1 tokens (the longest has %s): "
            "their ends, %s tokens, are cut off",
            f"{len(over):,}",
            f"{len(pair):,}",
            pair.prefix,
            sequence_length,
            f"{over.max():,}",
            f"{(over - sequence_length - 1).sum():,}",
        )
