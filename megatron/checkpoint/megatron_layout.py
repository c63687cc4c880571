"""What each rank of Megatron-LLM holds: its tensors by name, as placed canonical regions.

Query heads of a group come before its key and its value head, the up projection before the gate, rotary pairs are
interleaved, and the vocabulary is padded. Sections 6 and 7 of its format, as far as a family here has the function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron.checkpoint.layout import FileTensor, Placed, interleave, padding_rows
from megatron.model.config import ModelConfig
from megatron.model.families.family import Rows
from megatron.parallel.layout import Region
from megatron.utils.errors import ConfigError

Dialect = Literal["trainer", "converter"]

_ENCODER = {"trainer": "encoder", "converter": "transformer"}
_ATTENTION = {"trainer": "self_attention", "converter": "attention"}


@dataclass(frozen=True)
class MegatronGrid:
    """How a checkpoint is cut: `virtual` chunks per stage (1: not interleaved)."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError where Megatron-LLM cannot cut a model so."""
        stages = self.pipeline * self.virtual
        problems = [
            f"{name}={value} is not divisible by {self.tensor} tensor ranks"
            for name, value in (
                ("num_key_value_heads", config.num_key_value_heads),
                ("intermediate_size", config.intermediate_size),
            )
            if value % self.tensor
        ]
        if config.num_hidden_layers % stages:
            problems.append(f"num_hidden_layers={config.num_hidden_layers} is not divisible by {stages} stages")
        if problems:
            raise ConfigError(f"Megatron-LLM cannot cut this model so: {'; '.join(problems)}.")


@dataclass(frozen=True)
class _Rank:
    """One rank's share: builds the placed pieces of its tensors."""

    config: ModelConfig
    grid: MegatronGrid
    rank: int
    dtypes: Mapping[str, torch.dtype]

    def tensor(self, key: str, shape: tuple[int, ...], pieces: Sequence[Placed]) -> FileTensor:
        return FileTensor(key, shape, self.dtypes[pieces[0].region.name], tuple(pieces))

    def matrix(self, name: str, outs: tuple[int, int, int], ins: tuple[int, int, int], row: int) -> Placed:
        """Rows and columns, each (first, count, all), of a canonical [out, in] weight, from `row` of the file's on."""
        shape, start, size = (outs[2], ins[2]), (outs[0], ins[0]), (outs[1], ins[1])
        if self.config.family.transposed:
            return Placed(Region(name, shape[::-1], start[::-1], size[::-1]), (row, 0), transposed=True)
        return Placed(Region(name, shape, start, size), (row, 0))

    def share(self, extent: int) -> tuple[int, int, int]:
        """(first, count, all) of this rank's even share."""
        count = extent // self.grid.tensor
        return self.rank * count, count, extent

    def copied(self, key: str, name: str, shape: tuple[int, ...]) -> FileTensor:
        """A tensor that every rank has; the first rank's is read."""
        return self.tensor(key, shape, [Placed(Region.whole(name, shape), (0,) * len(shape), copy=self.rank > 0)])

    def norm(self, key: str, name: str) -> Iterator[FileTensor]:
        shape = (self.config.hidden_size,)
        yield self.copied(f"{key}.weight", f"{name}.weight", shape)
        if self.config.layer_norm_eps is not None:
            yield self.copied(f"{key}.bias", f"{name}.bias", shape)

    def vocabulary(self, key: str, name: str, padded: int, *, copy: bool = False) -> FileTensor:
        """A share of the rows of a padded matrix; padding repeats the last row, as their resharder has it."""
        rows, hidden, vocabulary = padded // self.grid.tensor, self.config.hidden_size, self.config.vocab_size
        first = self.rank * rows
        held = max(0, min(vocabulary - first, rows))
        shape = (vocabulary, hidden)
        pieces = [Placed(Region(name, shape, (first, 0), (held, hidden)), (0, 0), copy=copy)] if held else []
        pieces += padding_rows(Region(name, shape, (vocabulary - 1, 0), (1, hidden)), held, rows - held)
        return self.tensor(key, (rows, hidden), pieces)

    def column(self, key: str, layer: str, runs: Sequence[Rows], ins: int, bias: bool) -> Iterator[FileTensor]:
        """A layer whose output features are cut: these runs of rows after each other."""
        weights, biases, row = [], [], 0
        for run in runs:
            name, outs = f"{layer}.{run.layer}", (run.first, run.count, run.out_features)
            weights.append(self.matrix(f"{name}.weight", outs, (0, ins, ins), row))
            biases.append(Placed(Region(f"{name}.bias", (outs[2],), (outs[0],), (outs[1],)), (row,)))
            row += run.count
        yield self.tensor(f"{key}.weight", (row, ins), weights)
        if bias:
            yield self.tensor(f"{key}.bias", (row,), biases)

    def row(self, key: str, name: str, ins: int, bias: bool) -> Iterator[FileTensor]:
        """A layer whose input features are cut."""
        hidden = self.config.hidden_size
        share = self.share(ins)
        yield self.tensor(
            f"{key}.weight", (hidden, share[1]), [self.matrix(f"{name}.weight", (0, hidden, hidden), share, 0)]
        )
        if bias:
            yield self.copied(f"{key}.bias", f"{name}.bias", (hidden,))

    def query_key_value(self, key: str, layer: str) -> Iterator[FileTensor]:
        config = self.config
        first, count, _ = self.share(config.num_key_value_heads)
        queries = config.num_attention_heads // config.num_key_value_heads
        runs: list[Rows] = []
        rotary: set[int] = set()
        for group in range(first, first + count):
            heads = range(group * queries, (group + 1) * queries)
            query, keys, value = config.family.query_key_value(config, heads, range(group, group + 1))
            rotary |= set(range(len(runs), len(runs) + len(query) + len(keys)))
            runs += [*query, *keys, *value]
        for tensor in self.column(key, layer, runs, config.hidden_size, config.query_key_value_bias):
            if config.rope_theta is None:
                yield tensor
                continue
            pieces = [
                part
                for number, piece in enumerate(tensor.pieces)
                for part in (interleave(piece, config.head_dim) if number in rotary else (piece,))
            ]
            yield replace(tensor, pieces=tuple(pieces))

    def feed_forward(self, key: str, layer: str) -> Iterator[FileTensor]:
        inner = self.config.intermediate_size
        first, count, _ = self.share(inner)
        names = reversed(self.config.family.feed_forward_input)  # the up projection before the gate
        runs = [Rows(name, inner, first, count) for name in names]
        return self.column(key, layer, runs, self.config.hidden_size, self.config.mlp_bias)

    def layer(self, prefix: str, number: int, dialect: Dialect) -> Iterator[FileTensor]:
        config, family = self.config, self.config.family
        canonical, attention = family.layer(number), f"{prefix}.{_ATTENTION[dialect]}"
        heads = config.num_attention_heads * config.head_dim
        first, *second = family.layer_norms(config)
        yield from self.norm(f"{prefix}.input_layernorm", f"{canonical}.{first}")
        yield from self.query_key_value(f"{attention}.query_key_value", canonical)
        output = f"{canonical}.{family.attention_output}"
        yield from self.row(f"{attention}.dense", output, heads, config.attention_output_bias)
        for name in second:
            key = "mlp_layernorm" if config.parallel_norms == 2 else "post_attention_layernorm"
            yield from self.norm(f"{prefix}.{key}", f"{canonical}.{name}")
        yield from self.feed_forward(f"{prefix}.mlp.dense_h_to_4h", canonical)
        output = f"{canonical}.{family.feed_forward_output}"
        yield from self.row(f"{prefix}.mlp.dense_4h_to_h", output, config.intermediate_size, config.mlp_bias)


def chunk_tensors(
    config: ModelConfig,
    grid: MegatronGrid,
    *,
    rank: int,
    stage: int,
    chunk: int,
    padded: int,
    dtypes: Mapping[str, torch.dtype],
    dialect: Dialect,
) -> list[FileTensor]:
    """The tensors of one model chunk of one rank, in the order of its modules, by their path in the pickle."""
    share, family = _Rank(config, grid, rank, dtypes), config.family
    model = "model" if grid.virtual == 1 else f"model{chunk}"
    root, encoder = f"{model}/language_model", f"{model}/language_model/{_ENCODER[dialect]}"
    separator = "/" if dialect == "trainer" else "."
    layers = config.num_hidden_layers // (grid.pipeline * grid.virtual)
    number = chunk * grid.pipeline + stage
    is_first, is_last = number == 0, number == grid.pipeline * grid.virtual - 1
    tensors: list[FileTensor] = []
    if is_last and not config.tie_word_embeddings:
        tensors.append(share.vocabulary(f"{root}/lm_head", f"{family.head}.weight", padded))
    if is_first:
        words = f"{root}/embedding/word_embeddings{separator}weight"
        tensors.append(share.vocabulary(words, f"{family.embedding}.weight", padded))
        if family.positions is not None:
            shape = (config.max_position_embeddings, config.hidden_size)
            places = f"{root}/embedding/position_embeddings{separator}weight"
            tensors.append(share.copied(places, f"{family.positions}.weight", shape))
    for layer in range(layers):
        tensors += share.layer(f"{encoder}/layers.{layer}", number * layers + layer, dialect)
    if is_last:
        tensors += share.norm(f"{encoder}/final_layernorm", family.final_norm)
        if config.tie_word_embeddings and not is_first:
            key = f"{model}/word_embeddings_for_head/weight"
            tensors.append(share.vocabulary(key, f"{family.embedding}.weight", padded, copy=True))
    return tensors
