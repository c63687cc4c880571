"""What a family of models is: where its canonical weights lie, and how its `config.json` reads.

Canonical names and layouts are Hugging Face's, family by family. Our layers are the same for all families; a `Family`
says which canonical tensors their weights are. It must not know layers, ranks or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.model.config import ModelConfig


@dataclass(frozen=True)
class Rows:
    """Consecutive output features `first … first + count − 1`, of all `out_features`, of a canonical linear layer.

    `copy_axis` and `copy_rank` are those of the `Piece` that they become; the gradients of such copies are parts.
    """

    layer: str
    out_features: int
    first: int
    count: int
    copy_axis: str | None = None
    copy_rank: int = 0


# (config, query heads, key/value heads) → the rows of these queries, keys and values.
QueryKeyValue = Callable[["ModelConfig", range, range], tuple[list[Rows], list[Rows], list[Rows]]]


@dataclass(frozen=True)
class Family:
    """One `model_type`, with transformers' class of its models, `architecture`. Names are those of modules, to which
    `.weight` and `.bias` are added; those between `layers` and `final_norm` are within a layer.

    `fields` reads a `config.json` into the fields of `ModelConfig` and raises ConfigError; `write` is its inverse, with
    what transformers wants besides. `spell` completes a `config.json` so that transformers 4 and 5 both read it right.
    """

    model_type: str
    architecture: str
    embedding: str
    layers: str
    attention_norm: str
    query_key_value: QueryKeyValue
    attention_output: str
    feed_forward_norm: str
    feed_forward_input: tuple[str, ...]
    feed_forward_output: str
    final_norm: str
    head: str
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    positions: str | None = None  # the table of learned positions
    query_key_norms: tuple[str, ...] = ()  # norms of each query and of each key
    parallel_norms: tuple[str, ...] = ()  # the two norms of a parallel layer, where they have names of their own
    transposed: bool = False  # linear layers keep their weights as [in, out]
    prefix: str = ""  # what a file saved from the model without its head leaves out of all names but the head's
    buffers: tuple[str, ...] = ()  # endings of what old files hold besides weights
    dropouts: Mapping[str, float] = field(default_factory=dict)  # name in `config.json` → transformers' default
    spell: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    # Of a model made at random from `model.*`: which of these are needed, what they are called in `config.json` where
    # that is another name, and what else it says.
    required: tuple[str, ...] = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    own_names: Mapping[str, str] = field(default_factory=dict)
    own_defaults: Mapping[str, Any] = field(default_factory=dict)

    def layer(self, index: int) -> str:
        """The name of layer `index`, to which those within a layer are added."""
        return f"{self.layers}.{index}"

    @property
    def norms(self) -> tuple[str, ...]:
        within = (self.attention_norm, self.feed_forward_norm, *self.parallel_norms, *self.query_key_norms)
        return *within, self.final_norm

    def layer_norms(self, config: ModelConfig) -> tuple[str, ...]:
        """The norms of a layer's input to attention and, where it has one of its own, to the feed-forward part."""
        if config.parallel_norms == 1:
            return (self.attention_norm,)
        if config.parallel_norms == 2 and self.parallel_norms:
            return self.parallel_norms
        return self.attention_norm, self.feed_forward_norm

    @property
    def residual_outputs(self) -> tuple[str, ...]:
        """The linear layers that write to the residual stream."""
        return self.attention_output, self.feed_forward_output


def apart(query: str, key: str, value: str) -> QueryKeyValue:
    """Queries, keys and values are layers of their own."""

    def rows(config: ModelConfig, heads: range, key_value_heads: range) -> tuple[list[Rows], list[Rows], list[Rows]]:
        def of(layer: str, all_heads: int, held: range) -> list[Rows]:
            size = config.head_dim
            return [Rows(layer, all_heads * size, held.start * size, len(held) * size)]

        queries, keys = config.num_attention_heads, config.num_key_value_heads
        return of(query, queries, heads), of(key, keys, key_value_heads), of(value, keys, key_value_heads)

    return rows


def one_after_another(layer: str) -> QueryKeyValue:
    """One layer: all queries, then all keys, then all values."""

    def rows(config: ModelConfig, heads: range, key_value_heads: range) -> tuple[list[Rows], list[Rows], list[Rows]]:
        size, queries, keys = config.head_dim, config.num_attention_heads, config.num_key_value_heads

        def of(before: int, held: range) -> list[Rows]:
            return [Rows(layer, (queries + 2 * keys) * size, (before + held.start) * size, len(held) * size)]

        return of(0, heads), of(queries, key_value_heads), of(queries + keys, key_value_heads)

    return rows


def group_by_group(layer: str) -> QueryKeyValue:
    """One layer: the queries that the first key/value head serves, its key and its value; then those of the second."""

    def rows(config: ModelConfig, heads: range, key_value_heads: range) -> tuple[list[Rows], list[Rows], list[Rows]]:
        size, queries, groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        served, features = queries // groups, (queries + 2 * groups) * config.head_dim

        def of(group: int, place: int, count: int) -> Rows:
            return Rows(layer, features, (group * (served + 2) + place) * size, count * size)

        held = [
            (group, max(heads.start, group * served), min(heads.stop, (group + 1) * served)) for group in range(groups)
        ]
        return (
            [of(group, first - group * served, stop - first) for group, first, stop in held if first < stop],
            [of(group, served, 1) for group in key_value_heads],
            [of(group, served + 1, 1) for group in key_value_heads],
        )

    return rows
