"""A covering array: few runs in which every two features meet, in each pair of their values."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from tests.dist.case import Case

LARGEST_WORLD = 8

# Each feature's values, as the fields of a case that they set.
FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "tensor": {"whole": {}, "tp": {"tensor": 2}, "sp": {"tensor": 2, "sequence": True}},
    "pipeline": {
        "one stage": {},
        "1f1b": {"pipeline": 2},
        "gpipe": {"pipeline": 2, "schedule": "gpipe"},
        "interleaved": {"pipeline": 2, "schedule": "interleaved", "chunks": 2},
        "zero bubble": {"pipeline": 2, "schedule": "zero_bubble"},
    },
    "context": {
        "whole": {},
        "ring": {"context": 2},
        "gather": {"context": 2, "context_attention": "all_gather"},
    },
    "data": {
        "one": {},
        "replicas": {"data": 2},
        "zero 1": {"data": 2, "zero": 1},
        "zero 3": {"data": 2, "zero": 3},
    },
    "recompute": {
        "none": {},
        "selective": {"recompute": "selective"},
        "full": {"recompute": "full"},
        "some layers": {"recompute": "full", "recompute_layers": 2},
    },
    "model": {
        "llama": {},
        "one key-value head": {"key_value_heads": 1},
        "gpt2": {"family": "gpt2"},
        "gpt_neox": {"family": "gpt_neox"},
    },
    "output": {"own": {}, "tied": {"tied": True}},
    "attention": {"causal": {}, "documents": {"documents": True}},
    "layers": {"even": {}, "balanced": {"layers": 7, "split": "balanced"}},
    "micro-batches": {"four of one": {}, "two of two": {"micro_batches": 2, "micro_batch": 2}},
}

Choice = Mapping[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]


def pairs_of(choice: Choice) -> set[Pair]:
    """The pairs of values that a choice brings together."""
    return set(itertools.combinations(sorted(choice.items()), 2))


def all_pairs() -> set[Pair]:
    """Every pair of values of two features. No two of them exclude each other."""
    found: set[Pair] = set()
    for left, right in itertools.combinations(sorted(FEATURES), 2):
        found.update(((left, one), (right, other)) for one in FEATURES[left] for other in FEATURES[right])
    return found


def as_case(choice: Choice) -> Case:
    """The run with these values, named by those that are not the first of their feature."""
    fields: dict[str, Any] = {}
    for feature, value in choice.items():
        fields |= FEATURES[feature][value]
    told = [value for feature, value in choice.items() if value != next(iter(FEATURES[feature]))]
    return Case("-".join(told).replace(" ", "_") or "plain", **fields)


def covering_array(seed: int = 1, tries: int = 60) -> list[Choice]:
    """Choices that cover all pairs, greedily: of some that begin with a missing pair, the one that adds most."""
    generator = random.Random(seed)
    missing = all_pairs()
    array: list[Choice] = []
    while missing:
        begins = sorted(missing)
        candidates = [_complete(dict(generator.choice(begins)), missing, generator) for _ in range(tries)]
        best = max((each for each in candidates if _fits(each)), key=lambda each: len(pairs_of(each) & missing))
        missing -= pairs_of(best)
        array.append(best)
    return array


def _complete(choice: dict[str, str], missing: set[Pair], generator: random.Random) -> Choice:
    """The other features in any order, each with the value that adds most pairs to those chosen."""
    others: Sequence[str] = [feature for feature in FEATURES if feature not in choice]
    for feature in generator.sample(others, len(others)):
        values = generator.sample(list(FEATURES[feature]), len(FEATURES[feature]))
        choice[feature] = max(values, key=lambda value: len(pairs_of({**choice, feature: value}) & missing))
    return {feature: choice[feature] for feature in FEATURES}


def _fits(choice: Choice) -> bool:
    return as_case(choice).grid.world_size <= LARGEST_WORLD
