"""The datasets of a run, by `data.kind`: training samples in their order, validation sets, what these depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from megatron.config.batches import largest_batch
from megatron.config.data import SYNTHETIC, blends_of
from megatron.config.run import RunConfig
from megatron.data.build import (
    build_train_dataset,
    build_validation_datasets,
    open_pairs,
    open_training_sources,
    source_names,
)
from megatron.data.dataset import Dataset
from megatron.data.instruction.build import (
    build_instruction_training,
    build_instruction_validation,
    open_instruction_sources,
)
from megatron.data.instruction.pair import text_prefix
from megatron.data.ledger import ledger
from megatron.data.loader import MicroBatchDataset


def training_dataset(
    config: RunConfig, *, sequence_length: int, samples: int, vocab_size: int, length_unit: int
) -> Dataset | MicroBatchDataset:
    """The samples of `data.train`, at least `samples`; where their lengths differ, multiples of `length_unit`."""
    if config.data.kind == "instruction":
        return build_instruction_training(
            config.data, sequence_length=sequence_length, vocab_size=vocab_size, length_unit=length_unit
        )
    return build_train_dataset(config.data, sequence_length=sequence_length, samples=samples, vocab_size=vocab_size)


def validation_sets(
    config: RunConfig, *, sequence_length: int, vocab_size: int, length_unit: int
) -> Mapping[str, Dataset | MicroBatchDataset]:
    """The fixed set of each validation source, by a name of it; empty where there are none."""
    samples = config.evaluate.batches * largest_batch(config.train.global_batch)
    if config.data.kind == "instruction":
        return dict(
            build_instruction_validation(
                config.data,
                sequence_length=sequence_length,
                samples=samples,
                vocab_size=vocab_size,
                length_unit=length_unit,
            )
        )
    return dict(
        build_validation_datasets(config.data, sequence_length=sequence_length, samples=samples, vocab_size=vocab_size)
    )


def test_config(config: RunConfig) -> RunConfig | None:
    """The configuration whose validation data are the test data of this one; None where there are none."""
    if config.data.test is None:
        return None
    return replace(config, data=replace(config.data, validation=config.data.test, split=None))


def count_documents(config: RunConfig) -> list[int]:
    """The number of sequences in each training pair, as Megatron-LLM counts documents."""
    if config.data.train is None or config.data.train == SYNTHETIC:
        return []
    prefixes = dict.fromkeys(prefix for stage in blends_of(config.data.train) for _, prefix in stage.blend)
    if config.data.kind == "instruction":
        prefixes = dict.fromkeys(text_prefix(prefix) for prefix in prefixes)
    return [len(reader) for reader in open_pairs(prefixes)]


def describe_order(config: RunConfig, *, sequence_length: int, samples: int) -> dict[str, Any]:
    """What the order of the samples depends on: the position in it means the same only where all this is the same.

    Sources are known by their sizes, not by their paths, so that data may move.
    """
    data = config.data
    order: dict[str, Any] = {
        "data.order": data.order,
        "data.seed": data.seed,
        "data.sequence_length": sequence_length,
    }
    if data.kind == "instruction":
        order |= {f"data.{name}": getattr(data, name) for name in ("kind", "packing", "split", "split_rounding")}
        order["data.train"] = None if data.train is None else open_instruction_sources(data).describe()
        return order
    if data.order == "megatron" and data.train != SYNTHETIC:
        order["data.samples"] = samples
    if data.train == SYNTHETIC or data.train is None:
        order["data.train"] = data.train
    else:
        order["data.train"] = open_training_sources(data).describe()
    return order


def figures_of_sources(dataset: Dataset | MicroBatchDataset) -> Callable[[int], dict[str, float | int]]:
    """A function from a position to the figures of each source: the tokens of it that were predicted, and the epochs
    that is."""
    if isinstance(dataset, MicroBatchDataset):
        return lambda position: {}
    names = source_names([account.prefix for account in ledger(dataset, 0)])

    def figures(position: int) -> dict[str, float | int]:
        found: dict[str, float | int] = {}
        for name, account in zip(names, ledger(dataset, position), strict=True):
            found[f"tokens/{name}"], found[f"epochs/{name}"] = account.tokens, account.epochs
        return found

    return figures
