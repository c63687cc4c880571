"""A model with another vocabulary, as a source like any other: more rows and a tokenizer that knows them, or fewer.

Only rows past those of the model are made up. It must not know what is written, nor how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron.checkpoint.source import Source
from megatron.checkpoint.strided import BLOCK_BYTES
from megatron.model.families import family_of
from megatron.model.initialize import fill_region
from megatron.parallel.layout import Region
from megatron.tokenizer import find_tokenizer, load_tokenizer
from megatron.tokenizer.extend import extend_tokenizer
from megatron.tokenizer.tokenizer import Tokenizer
from megatron.utils.errors import ConfigError, DataError
from megatron.utils.logging import get_logger

Initialization = Literal["mean", "normal", "copy"]

_SEED = 1
_logger = get_logger(__name__)


@dataclass(frozen=True)
class Extension:
    """Tokens to add, and what their rows of embedding and output layer begin as. `size` is how many rows these have
    in the end (None: as many as the model or its tokens need); what is beyond it is left out.

    `mean`: the mean of the model's rows. `normal`: drawn with the mean and the standard deviation of each column over
    them, the same at each call. `copy`: the last row, as Megatron-LLM's resharder has it.
    """

    tokens: tuple[str, ...] = ()
    initialization: Initialization = "mean"
    size: int | None = None


class ExtendedSource(Source):
    """`source` with an extension: all but the rows that it has not is read from its files."""

    def __init__(self, source: Source, extension: Extension) -> None:
        """Raises ConfigError and CheckpointError; the weights are known to be those of the model."""
        self.old_size = int(source.model_config["vocab_size"])
        tokens, self._tokenizer_content = _extended_tokenizer(source, extension, self.old_size)
        self.new_size = extension.size or max(self.old_size, tokens)
        if self.new_size < tokens:
            raise ConfigError(
                f"--vocab-size {self.new_size}: the tokenizer has {tokens} tokens, each of which needs a row; give "
                f"{tokens} or more."
            )
        super().__init__(
            source.folder,
            source.index,
            source.weight_files,
            format=source.format,
            model_config={**source.model_config, "vocab_size": self.new_size},
            manifest=source.manifest,
            state=source.state,
        )
        self.tokenizer_files = source.tokenizer_files
        family, held = family_of(self.model_config), source.shapes()
        names = [name for name in (f"{family.embedding}.weight", f"{family.head}.weight") if name in held]
        self._names = frozenset(names if self.new_size != self.old_size else ())
        rows = _INITIAL[extension.initialization]
        self._rows = {name: rows(source, name, held[name]) for name in self._names if self.new_size > self.old_size}
        _tell_rows(self.old_size, self.new_size)

    def shapes(self, kind: str = "weights") -> dict[str, tuple[int, ...]]:
        found = super().shapes(kind)
        extended = {name: (self.new_size, *found[name][1:]) for name in self._names if name in found}
        return {**found, **extended}

    def read(self, region: Region, out: torch.Tensor, kind: str = "weights") -> None:
        if region.name not in self._names:
            super().read(region, out, kind)
            return
        first, count = region.start[0], region.size[0]
        held = max(0, min(self.old_size - first, count))
        if held:
            old_shape = (self.old_size, *region.shape[1:])
            old = replace(region, shape=old_shape, size=(held, *region.size[1:]))
            super().read(old, out[:held], kind)
        if held < count:
            start = (first + held, *region.start[1:])
            new = replace(region, start=start, size=(count - held, *region.size[1:]))
            self._rows[region.name](new, out[held:])

    def carried(self) -> dict[str, bytes]:
        return {**super().carried(), **self._tokenizer_content}


def _extended_tokenizer(source: Source, extension: Extension, rows: int) -> tuple[int, dict[str, bytes]]:
    """How many tokens the tokenizer has with those that are added (0: there is none), and its files that change."""
    folder = source.tokenizer_files[0].parent if source.tokenizer_files else source.folder
    if not extension.tokens:
        file = find_tokenizer(folder)
        return (0 if file is None else load_tokenizer(file).vocab_size), {}
    try:
        before, after, files = extend_tokenizer(folder, extension.tokens)
    except DataError as error:
        raise ConfigError(f"--extra-tokens: {error}") from error
    _tell(before, after, rows, extension)
    return after.vocab_size, files


def _tell_rows(before: int, after: int) -> None:
    if after < before:
        _logger.warning("rows %s to %s of the vocabulary are left out: no token is theirs", after, before - 1)
    elif after > before:
        _logger.info("rows of the vocabulary: %s -> %s", f"{before:,}", f"{after:,}")


def _tell(before: Tokenizer, after: Tokenizer, old_size: int, extension: Extension) -> None:
    """Notices of what became of the tokens."""
    known = {token: before.token_id(token) for token in extension.tokens}
    kept = [f"{token} {identity}" for token, identity in known.items() if identity is not None]
    new = [(token, after.token_id(token) or 0) for token, identity in known.items() if identity is None]
    if kept:
        _logger.warning("already in the tokenizer, kept as they are there: %s", ", ".join(kept))
    if new:
        listed = ", ".join(f"{token} {identity}" for token, identity in new)
        _logger.info("vocabulary %s -> %s: %s", f"{before.vocab_size:,}", f"{after.vocab_size:,}", listed)
    rows = [token for token, identity in new if identity < old_size]
    if rows:
        message = "the model has %s rows, those of %s of the new tokens among them: they are kept as they are"
        _logger.warning(message, f"{old_size:,}", "all" if len(rows) == len(new) else len(rows))


Rows = Callable[[Region, torch.Tensor], None]  # fills rows past those of the model


def _mean_rows(source: Source, name: str, shape: tuple[int, ...]) -> Rows:
    mean = _mean(source, name, shape)
    return lambda region, out: _fill(out, mean, region)


def _normal_rows(source: Source, name: str, shape: tuple[int, ...]) -> Rows:
    mean = _mean(source, name, shape)
    squares = sum((block - mean).square().sum(0) for block in _blocks(source, name, shape))
    deviation = torch.sqrt(torch.as_tensor(squares) / shape[0])

    def rows(region: Region, out: torch.Tensor) -> None:
        values = torch.empty(region.size, dtype=torch.float64)
        fill_region(region, values, _SEED, 1.0)
        columns = region.slices[1]
        out.copy_(values * deviation[columns] + mean[columns])

    return rows


def _last_rows(source: Source, name: str, shape: tuple[int, ...]) -> Rows:
    last = torch.empty((1, *shape[1:]), dtype=torch.float64)
    source.read(Region(name, shape, (shape[0] - 1, 0), (1, shape[1])), last)
    return lambda region, out: _fill(out, last[0], region)


_INITIAL: dict[Initialization, Callable[[Source, str, tuple[int, ...]], Rows]] = {
    "mean": _mean_rows,
    "normal": _normal_rows,
    "copy": _last_rows,
}


def _fill(out: torch.Tensor, row: torch.Tensor, region: Region) -> None:
    out.copy_(row[region.slices[1]].expand(region.size))


def _mean(source: Source, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    total = torch.zeros(shape[1], dtype=torch.float64)
    for block in _blocks(source, name, shape):
        total += block.sum(0)
    return total / shape[0]


def _blocks(source: Source, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """The rows of a stored matrix in float64, a bounded number at a time."""
    rows = max(1, BLOCK_BYTES // (shape[1] * torch.float64.itemsize))
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        block = torch.empty(count, shape[1], dtype=torch.float64)
        source.read(Region(name, shape, (first, 0), (count, shape[1])), block)
        yield block
