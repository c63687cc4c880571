"""A model with adapters put into its weights, as a source like any other: W + scale · B · A, in float32 at least.

Products are taken as rows are read, so that memory holds the adapters of one layer and what was asked for. It must not
know what the model is used for.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import torch

from megatron.checkpoint.hub import local_folder
from megatron.checkpoint.peft import StoredAdapter, is_peft
from megatron.checkpoint.source import Source, open_peft, open_stored
from megatron.checkpoint.strided import BLOCK_BYTES
from megatron.model.config import ModelConfig
from megatron.model.families import family_of
from megatron.model.families.family import Family
from megatron.model.lora import DOWN, UP, Lora, adapter_of, linear_layers
from megatron.parallel.layout import Region
from megatron.tokenizer import find_tokenizer
from megatron.utils.errors import CheckpointError
from megatron.utils.hub import parse_address


class AdaptedSource(Source):
    """`base` with the adapters of `stored` in its weights; step, state and tokenizer are those of `stored` where it has
    them. Raises CheckpointError where the adapters are not for this model."""

    def __init__(self, base: Source, stored: Source) -> None:
        super().__init__(
            stored.folder,
            {"weights": base.index["weights"]},
            base.weight_files,
            format=stored.format,
            model_config=base.model_config,
            manifest=stored.manifest,
            tokenizer_folder=next(
                (one.tokenizer_folder for one in (stored, base) if find_tokenizer(one.tokenizer_folder) is not None),
                stored.tokenizer_folder,
            ),
        )
        self.base, self.stored = base, stored
        check_base(base, stored)
        adapter = adapter_in(stored)
        self._scale = Lora(adapter.rank, adapter.alpha, adapter.rslora, ()).scale
        self._family = family_of(base.model_config)
        self._adapted = {adapter_of(name) for name in stored.shapes()}
        self._factors: tuple[str, torch.Tensor, torch.Tensor] | None = None

    @property
    def parts(self) -> list[Source]:
        return [*self.base.parts, *self.stored.parts]

    def shapes(self, kind: str = "weights") -> dict[str, tuple[int, ...]]:
        return self.base.shapes() if kind == "weights" else {}

    def dtype(self, name: str, kind: str = "weights") -> torch.dtype:
        return self.base.dtype(name, kind)

    def read(self, region: Region, out: torch.Tensor, kind: str = "weights") -> None:
        layer = region.name.removesuffix(".weight")
        if layer not in self._adapted:
            self.base.read(region, out, kind)
            return
        down, up = self._read_factors(layer)
        transposed = is_transposed(self._family, layer)
        rows, columns = region.slices[::-1] if transposed else region.slices
        wide = torch.promote_types(torch.float32, out.dtype)
        step = max(1, BLOCK_BYTES // max(1, region.size[1] * wide.itemsize))
        for first in range(0, region.size[0], step):
            count = min(step, region.size[0] - first)
            start = region.start[0] + first
            part = replace(region, start=(start, region.start[1]), size=(count, region.size[1]))
            values = torch.empty(part.size, dtype=wide)
            self.base.read(part, values)
            some = slice(start, start + count)
            if transposed:
                values.addmm_(down[:, some].t().to(wide), up[rows].t().to(wide), alpha=self._scale)
            else:
                values.addmm_(up[some].to(wide), down[:, columns].to(wide), alpha=self._scale)
            out[first : first + count].copy_(values)

    def again(self) -> Source:
        other = super().again()
        assert isinstance(other, AdaptedSource)
        other.base, other.stored, other._factors = self.base.again(), self.stored.again(), None
        return other

    def close(self) -> None:
        super().close()
        self.base.close()
        self.stored.close()

    def _read_factors(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of a layer, kept until those of another are read."""
        if self._factors is None or self._factors[0] != layer:
            self._factors = layer, self._read_whole(layer + DOWN), self._read_whole(layer + UP)
        return self._factors[1:]

    def _read_whole(self, name: str) -> torch.Tensor:
        shape = self.stored.shapes()[name]
        values = torch.empty(shape, dtype=torch.promote_types(torch.float32, self.stored.dtype(name)))
        self.stored.read(Region.whole(name, shape), values)
        return values


def open_adapter(path: str | Path) -> Source:
    """The adapters themselves in a folder of PEFT's (also on the hub), or in a checkpoint or save folder of a run that
    trained some. Raises CheckpointError where there are none."""
    folder = local_folder(path)
    stored = open_peft(folder) if is_peft(folder) else open_stored(folder)
    if stored.adapter is None:
        raise CheckpointError(
            f"{stored.folder} holds a model and no adapters: give a folder in PEFT's format, or a checkpoint of a run "
            "with lora.rank."
        )
    return stored


def with_base(stored: Source, above: tuple[Path, ...] = ()) -> Source:
    """The model that adapters make of the one that they were trained on, which may itself be made by adapters; `above`
    are the folders of those that are put into this one. Raises CheckpointError where it is not there, or is another."""
    base = adapter_in(stored).base
    if base is None or not (Path(base).is_dir() or parse_address(base)):
        what = "do not say which model they are for" if base is None else f"are for {base}, which is no folder here"
        raise CheckpointError(
            f"The adapters in {stored.folder} {what}: put them into it with `megatron convert MODEL DST --adapter "
            f"{stored.folder}`, or train them further with model.init_from and lora.init_from."
        )
    folders = (*above, stored.folder.resolve())
    under = open_stored(base)
    if under.folder.resolve() in folders:
        raise CheckpointError(f"The adapters in {stored.folder} say that they are for themselves: {base}.")
    return AdaptedSource(under if under.adapter is None else with_base(under, folders), stored)


def adapter_in(stored: Source) -> StoredAdapter:
    """What a source of adapters says of them."""
    assert stored.adapter is not None, stored.folder
    return stored.adapter


def lora_of(stored: Source, config: ModelConfig) -> Lora:
    """The adapters as a run trains them. Raises CheckpointError where its layers have not all the same ones."""
    adapter, known = adapter_in(stored), linear_layers(config)
    found: dict[str, set[int]] = {}
    others = []
    for name in stored.shapes():
        index, _, target = (adapter_of(name) or "").removeprefix(f"{config.family.layers}.").partition(".")
        if index.isdigit() and target in known:
            found.setdefault(target, set()).add(int(index))
        else:
            others.append(name)
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise CheckpointError(
            f"The adapters in {stored.folder} are for more than the linear layers within the model's layers, which are "
            f"what is trained here: {', '.join(others[:5])}{more}."
        )
    layers = set(range(config.num_hidden_layers))
    partly = sorted(target for target, where in found.items() if where != layers)
    if partly:
        raise CheckpointError(
            f"The adapters in {stored.folder} are for some layers of the model only ({', '.join(partly)}): what is "
            f"trained here has them in all {config.num_hidden_layers}."
        )
    return Lora(adapter.rank, adapter.alpha, adapter.rslora, tuple(target for target in known if target in found))


def check_base(base: Source, stored: Source) -> None:
    """Raise one CheckpointError with all in which adapters do not fit a model."""
    adapter, shapes = adapter_in(stored), _read_shapes(base)
    family = family_of(base.model_config)
    found, problems = stored.shapes(), []
    for name, shape in found.items():
        layer = adapter_of(name)
        if layer is None:
            problems.append(f"{name} is no adapter of a linear layer, and all else must be left as the model has it")
            continue
        weight = shapes.get(f"{layer}.weight")
        if weight is None or len(weight) != 2 or layer == family.embedding:
            problems.append(f"{name} belongs to no linear layer of it")
            continue
        partner = layer + (UP if name.endswith(DOWN) else DOWN)
        if partner not in found:
            problems.append(f"{name} is there without {partner}")
        out_features, in_features = weight[::-1] if is_transposed(family, layer) else weight
        fits = (adapter.rank, in_features) if name.endswith(DOWN) else (out_features, adapter.rank)
        if shape != fits:
            problems.append(f"{name} has shape {list(shape)}, not {list(fits)}")
        elif not stored.dtype(name).is_floating_point:
            problems.append(f"{name} is of {stored.dtype(name)}")
    if not found:
        problems.append("there are no tensors")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"The adapters in {stored.folder} do not fit the model in {base.folder}: {'; '.join(problems[:5])}{more}."
        )
    if adapter.fingerprint is not None and adapter.fingerprint != fingerprint(base):
        raise CheckpointError(
            f"{base.folder} is not the model that the adapters in {stored.folder} were trained on: its weights have "
            "other values. Name that model's folder."
        )


def is_transposed(family: Family, layer: str) -> bool:
    """Whether the weight of a linear layer is kept as [in, out]; those of adapters never are."""
    return family.transposed and layer.startswith(f"{family.layers}.")


def fingerprint(source: Source) -> str:
    """A word for the values of a model, the same in every format and however it is cut: of a few rows of each tensor,
    so that it takes no time, and yet no two trainings have the same."""
    digest = hashlib.sha256()
    for name, shape in sorted(_read_shapes(source).items()):
        digest.update(f"{name} {list(shape)}\n".encode())
        for region in _sample(name, shape):
            values = torch.empty(region.size, dtype=torch.float64)
            source.read(region, values)
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _sample(name: str, shape: tuple[int, ...]) -> list[Region]:
    """The first row of a matrix, the one in the middle and the last; a vector is small enough."""
    if len(shape) < 2:
        return [Region.whole(name, shape)]
    rows = sorted({0, shape[0] // 2, shape[0] - 1})
    return [Region(name, shape, (row, *(0 for _ in shape[1:])), (1, *shape[1:])) for row in rows]


def _read_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """Of the tensors that count: not what old files hold besides, nor an output layer that is the embedding."""
    family = family_of(source.model_config)
    config = ModelConfig.from_huggingface(source.model_config)
    without = {f"{family.head}.weight"} if config.tie_word_embeddings else set()
    shapes = source.shapes()
    return {name: shape for name, shape in shapes.items() if name not in without and not name.endswith(family.buffers)}


def base_path(stated: str | None, base: Source) -> str:
    """How a checkpoint names the model that it adapts: so that it is found from any working directory, and still when
    the run that saved it goes on. `stated` is how it was named."""
    return stated if stated is not None and parse_address(stated) else os.path.abspath(base.folder)
