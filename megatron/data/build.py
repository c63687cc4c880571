"""From the `data` section to datasets, and the check that data and model speak of the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from megatron.config.data import SYNTHETIC, DataConfig, blends_of
from megatron.config.data import Blend as ConfiguredBlend
from megatron.data.blend import Blend, MegatronChoices, StableChoices, Stage, member_samples, normalised
from megatron.data.dataset import ENDLESS, Dataset
from megatron.data.indexed import IndexedReader, require_pair
from megatron.data.instruction.pair import require_conversations, require_no_conversations, text_prefix
from megatron.data.native import greedy_choices
from megatron.data.pretraining import MegatronOrderDataset, StableOrderDataset, StoredDataset
from megatron.data.provenance import provenance_path, read_provenance
from megatron.data.split import split_bounds
from megatron.data.stream import Stream
from megatron.data.synthetic import SyntheticDataset
from megatron.data.windows import StreamWindows
from megatron.tokenizer import load_tokenizer
from megatron.utils.errors import ConfigError, DataError
from megatron.utils.logging import get_logger

_LOGGER = get_logger(__name__)

TRAINING, VALIDATION, TEST = range(3)  # parts of data.split
PART_NAMES, PART_PLACES = ("training", "validation", "test"), ("first", "second", "third")

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingSources:
    """The distinct pairs of `data.train`, the part of each that is for training, and the blends of them.

    `blends` are (from so many tokens of the run on, the (weight, number of the source) of each member).
    """

    streams: tuple[Stream, ...]
    blends: tuple[tuple[int, tuple[tuple[float, int], ...]], ...]

    def describe(self) -> list[dict[str, Any]]:
        """What the order of the samples depends on. Sources are known by their sizes, so that data may move."""
        described: list[dict[str, Any]] = [
            {
                "from_tokens": from_tokens,
                "blend": [
                    {"weight": weight, "sequences": len(self.streams[at].sizes), "tokens": self.streams[at].num_tokens}
                    for weight, at in blend
                ],
                "sources": [at for _, at in blend],
            }
            for from_tokens, blend in self.blends
        ]
        only: list[dict[str, Any]] = described[0]["blend"]
        return described if len(described) > 1 else only


def blends_begun(described: list[dict[str, Any]], position: int, sequence_length: int) -> list[dict[str, Any]]:
    """Of what `TrainingSources.describe` gave, the blends that samples before `position` are of: in the stable order,
    only these cannot be changed any more."""
    if described and "from_tokens" not in described[0]:
        described = [{"from_tokens": 0, "blend": described, "sources": list(range(len(described)))}]
    return [stage for stage in described if -(-stage["from_tokens"] // sequence_length) < max(1, position)]


def open_training_sources(config: DataConfig) -> TrainingSources:
    """The sources of `data.train`, which is neither null nor synthetic. Raises one DataError for all pairs that are
    missing or damaged, ConfigError where data.split is no split."""
    assert config.train is not None and config.train != SYNTHETIC
    stages = blends_of(config.train)
    prefixes = list(dict.fromkeys(prefix for stage in stages for _, prefix in stage.blend))
    streams = tuple(_part(config, reader, TRAINING) for reader in open_pairs(prefixes))
    by_size = [max(1, stream.num_tokens) ** (1 / config.temperature) for stream in streams]
    numbers = {prefix: number for number, prefix in enumerate(prefixes)}

    def members(blend: ConfiguredBlend) -> tuple[tuple[float, int], ...]:
        return tuple(
            (by_size[numbers[prefix]] if weight is None else weight, numbers[prefix]) for weight, prefix in blend
        )

    return TrainingSources(streams, tuple((stage.from_tokens, members(stage.blend)) for stage in stages))


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
    sources = open_training_sources(config)
    firsts = [-(-from_tokens // sequence_length) for from_tokens, _ in sources.blends]
    kind = StableChoices if config.order == "stable" else MegatronChoices
    stages = [
        Stage(first, kind([weight for weight, _ in blend]), tuple(source for _, source in blend))
        for first, (_, blend) in zip(firsts, sources.blends, strict=True)
    ]
    members: list[StoredDataset]
    if config.order == "stable":
        members = [
            StableOrderDataset(stream, sequence_length=sequence_length, seed=config.seed) for stream in sources.streams
        ]
    else:
        members = [
            MegatronOrderDataset(stream, sequence_length=sequence_length, samples=needed, seed=config.seed)
            for stream, needed in zip(sources.streams, _member_samples(sources, firsts, samples), strict=True)
        ]
    if len(members) == 1:
        return members[0]
    return Blend(members, stages, ENDLESS if config.order == "stable" else samples)


def _member_samples(sources: TrainingSources, firsts: list[int], samples: int) -> list[int]:
    """Samples that each source is built for in the `megatron` order. One source alone has none of a blend's surplus:
    the order depends on the number."""
    needed = [0] * len(sources.streams)
    for first, following, (_, blend) in zip(firsts, [*firsts[1:], samples], sources.blends, strict=True):
        length = max(0, min(following, samples) - first)
        for weight, (_, source) in zip(normalised([weight for weight, _ in blend]), blend, strict=True):
            needed[source] += length if len(blend) == 1 else member_samples(length, weight)
    return [max(1, count) for count in needed]


def build_validation_datasets(
    config: DataConfig, *, sequence_length: int, samples: int | None, vocab_size: int, part: int = VALIDATION
) -> list[tuple[str, Dataset]]:
    """A fixed set for each validation source, with a name of it: its first windows in file order. Empty if there are
    none.

    The sources are those of `data.validation`, or a part of data.split (the second) of those of `data.train`. They
    share `samples` by weight (alike, where they have none), at least a window each; one that has fewer gives all it
    has, and all do where `samples` is None.
    """
    if config.validation == SYNTHETIC:
        assert samples is not None, "synthetic data have no end"
        synthetic = SyntheticDataset(
            vocab_size=vocab_size, sequence_length=sequence_length, seed=config.seed, stream=1, samples=samples
        )
        return [(SYNTHETIC, synthetic)]
    blend = validation_blend(config)
    if not blend:
        return []
    shares = shares_of(blend, samples)
    part = TRAINING if config.validation is not None else part
    readers = open_pairs(prefix for _, prefix in blend)
    streams = [Stream(reader) if part == TRAINING else _part(config, reader, part) for reader in readers]
    found: list[tuple[str, Dataset]] = []
    for name, stream, share in zip(source_names([prefix for _, prefix in blend]), streams, shares, strict=True):
        if part == TRAINING or stream.num_tokens >= 2:  # a split may leave nothing of a small pair
            found.append((name, StreamWindows(stream, sequence_length, share)))
    if not found:
        raise DataError(
            f"data.split={config.split} leaves no pair of data.train two tokens for {PART_NAMES[part]}; give its "
            f"{PART_PLACES[part]} part more, or name a pair in data.{PART_NAMES[part]}"
        )
    return found


def shares_of(blend: ConfiguredBlend, samples: int | None) -> list[int] | list[None]:
    """How many of `samples` each validation source has, by weight, at least one; None where they give all they have."""
    if samples is None:
        return [None] * len(blend)
    shares = [0] * len(blend)
    greedy_choices(normalised([1.0 if weight is None else weight for weight, _ in blend]), shares, 0, samples)
    return [max(1, share) for share in shares]


def held_out(config: DataConfig, part: int) -> DataConfig:
    """The configuration whose `validation`, or part of data.split, is what is held out for validation or for a test.

    Raises ConfigError where there is nothing, or no end of it.
    """
    named = config.test if part == TEST else config.validation
    if named == SYNTHETIC:
        raise ConfigError(f"data.{PART_NAMES[part]}=synthetic has no end, so it has no mean loss; name a pair there")
    found = replace(config, validation=named, test=None, split=config.split if named is None else None)
    if not validation_blend(found):
        raise ConfigError(
            f"there are no data for {PART_NAMES[part]}: neither is data.{PART_NAMES[part]} set, nor data.split with a "
            "pair in data.train; set one of them"
        )
    return found


def validation_prefixes(config: DataConfig) -> list[str]:
    """The pair of tokens of each validation source."""
    prefixes = [prefix for _, prefix in validation_blend(config)]
    return prefixes if config.kind == "pretraining" else [text_prefix(prefix) for prefix in prefixes]


def validation_blend(config: DataConfig) -> ConfiguredBlend:
    """(weight, prefix) of each validation source."""
    if config.validation is not None:
        return blends_of(config.validation)[0].blend
    if config.split is None or config.train is None or config.train == SYNTHETIC:
        return ()
    first: dict[str, float | None] = {}
    for stage in blends_of(config.train):
        for weight, prefix in stage.blend:
            first.setdefault(prefix, weight)
    if None in first.values():
        return tuple((None, prefix) for prefix in first)
    return tuple((weight, prefix) for prefix, weight in first.items())


def _part(config: DataConfig, reader: IndexedReader, part: int) -> Stream:
    """The part of a pair that data.split leaves for training, validation or a test."""
    if config.split is None:
        return Stream(reader)
    bounds = split_bounds(config.split, len(reader), config.split_rounding)
    return Stream(reader, bounds[part], bounds[part + 1])


def source_names(prefixes: Sequence[str]) -> list[str]:
    """A short name for each prefix: its last parts, as many as tell them apart."""
    parts = [Path(prefix).parts for prefix in prefixes]
    longest = max((len(part) for part in parts), default=1)
    names = list(prefixes)
    for count in range(1, longest + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def data_prefixes(config: DataConfig) -> list[str]:
    """The pairs of tokens that a configuration reads, each once. Raises DataError where data are of the other kind."""
    sources = (config.train, config.validation, config.test)
    named = [source for source in sources if source is not None and source != SYNTHETIC]
    stages = [stage for source in named for stage in blends_of(source)]
    prefixes = dict.fromkeys(prefix for stage in stages for _, prefix in stage.blend)
    if config.kind == "pretraining":
        _for_each(prefixes, require_no_conversations)
        return list(prefixes)
    _for_each(prefixes, require_conversations)
    return [text_prefix(prefix) for prefix in prefixes]


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
