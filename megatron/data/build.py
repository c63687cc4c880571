"""From the `data` section to datasets, and the check that data and model speak of the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from megatron.config.data import SYNTHETIC, DataConfig, Source
from megatron.data.blend import MegatronBlend, StableBlend, greedy_choices, member_samples, normalised
from megatron.data.dataset import Dataset
from megatron.data.indexed import IndexedReader, require_pair
from megatron.data.pretraining import MegatronOrderDataset, StableOrderDataset
from megatron.data.provenance import provenance_path, read_provenance
from megatron.data.synthetic import SyntheticDataset
from megatron.data.windows import FixedSet, StreamWindows
from megatron.tokenizer import load_tokenizer
from megatron.utils.errors import ConfigError, DataError
from megatron.utils.logging import get_logger

_LOGGER = get_logger(__name__)

T = TypeVar("T")


def build_train_dataset(config: DataConfig, *, sequence_length: int, samples: int, vocab_size: int) -> Dataset:
    """The training samples of `data.train` in `data.order`, at least `samples` of them.

    Raises ConfigError if nothing is named, DataError for data that are missing, damaged or too short.
    """
    if config.train is None:
        raise ConfigError(
            "data.train is not set; give the prefix of a .bin/.idx pair, a list of [weight, prefix], or synthetic"
        )
    if config.train == SYNTHETIC:
        return SyntheticDataset(vocab_size=vocab_size, sequence_length=sequence_length, seed=config.seed)
    blend = _as_blend(config.train)
    weights = normalised([weight for weight, _ in blend])
    if config.order == "stable":
        endless = [StableOrderDataset(prefix, sequence_length=sequence_length, seed=config.seed) for _, prefix in blend]
        return endless[0] if len(endless) == 1 else StableBlend(endless, weights)
    if len(blend) == 1:  # no blend, so none of its surplus: the order depends on the number asked for
        return MegatronOrderDataset(blend[0][1], sequence_length=sequence_length, samples=samples, seed=config.seed)
    members = [
        MegatronOrderDataset(
            prefix, sequence_length=sequence_length, samples=member_samples(samples, weight), seed=config.seed
        )
        for (_, prefix), weight in zip(blend, weights, strict=True)
    ]
    return MegatronBlend(members, weights, samples=samples)


def build_validation_dataset(
    config: DataConfig, *, sequence_length: int, samples: int, vocab_size: int
) -> Dataset | None:
    """The first `samples` windows of `data.validation` in file order, a fixed set; None if there is none.

    In a blend the streams share `samples` by weight. A stream with fewer windows gives all it has, so the set may be
    smaller than `samples`: read it with the loader's `pad_last`.
    """
    if config.validation is None:
        return None
    if config.validation == SYNTHETIC:
        synthetic = SyntheticDataset(vocab_size=vocab_size, sequence_length=sequence_length, seed=config.seed, stream=1)
        return FixedSet([(synthetic, samples)])
    blend = _as_blend(config.validation)
    shares = [0] * len(blend)
    greedy_choices(normalised([weight for weight, _ in blend]), shares, 0, samples)
    return FixedSet(
        [(StreamWindows(prefix, sequence_length), share) for (_, prefix), share in zip(blend, shares, strict=True)]
    )


def data_prefixes(config: DataConfig) -> list[str]:
    """The pairs that a configuration reads, each once."""
    named = [source for source in (config.train, config.validation) if source is not None and source != SYNTHETIC]
    return list(dict.fromkeys(prefix for source in named for _, prefix in _as_blend(source)))


def check_tokenizer(prefixes: Iterable[str], tokenizer: Path | None, vocab_size: int) -> None:
    """Check that pairs were made with the model's tokenizer, as far as their `.json` files tell.

    `tokenizer` is the one in use (None: unknown); tokens that were added to it for a pair may differ, as long as they
    are within `vocab_size`, the model's. A pair without a `.json` (one that Megatron made, say) passes with a message.
    Raises one DataError for all pairs that are missing or have another tokenizer or a larger vocabulary.
    """
    _for_each(prefixes, lambda prefix: _check_pair(prefix, tokenizer, vocab_size))


def open_pairs(prefixes: Iterable[str]) -> list[IndexedReader]:
    """The pairs, opened. Raises one DataError for all that are missing or damaged."""
    return _for_each(prefixes, IndexedReader)


def _for_each(prefixes: Iterable[str], action: Callable[[str], T]) -> list[T]:
    """What `action` gives for each pair; the DataErrors of all together where there are any."""
    results, problems = [], []
    for prefix in prefixes:
        try:
            results.append(action(prefix))
        except DataError as error:
            problems.append(str(error))
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise DataError(f"{len(problems)} of the data's pairs cannot be used:{listed}")
    return results


def _check_pair(prefix: str, tokenizer: Path | None, vocab_size: int) -> None:
    require_pair(prefix)
    provenance = read_provenance(prefix)
    if provenance is None:
        _LOGGER.info("%s is not there: whether the data fit the tokenizer is not checked", provenance_path(prefix))
        return
    if provenance.vocabulary_size > vocab_size:
        raise DataError(
            f"{prefix} was tokenized with a vocabulary of {provenance.vocabulary_size:,} ({provenance.tokenizer}, "
            f"{len(provenance.added_tokens)} added tokens), but the model has {vocab_size:,} tokens; "
            "tokenize with the model's tokenizer, or enlarge the model's vocabulary"
        )
    if tokenizer is None:
        return
    fingerprint = load_tokenizer(tokenizer, provenance.added_tokens).fingerprint
    if provenance.tokenizer_fingerprint != fingerprint:
        raise DataError(
            f"{prefix} was made with another tokenizer ({provenance.tokenizer}, fingerprint "
            f"{provenance.tokenizer_fingerprint[:12]}) than the model's ({tokenizer}, fingerprint "
            f"{fingerprint[:12]}), so its ids mean other tokens; run `megatron preprocess` with the "
            "model's tokenizer"
        )


def _as_blend(source: Source) -> list[tuple[float, str]]:
    return [(1.0, source)] if isinstance(source, str) else [(float(weight), prefix) for weight, prefix in source]
